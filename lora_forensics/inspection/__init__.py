"""One checkpoint looked at, or the difference of two: what `inspect` tells.

`values` are what it found, free of torch, so that reports can render them; `looking` and `difference` find it.
"""
