"""One checkpoint, or two, in the terminal; every text from a file goes through `plain`."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_forensics.inspection.metadata import unfolded
from lora_forensics.inspection.values import (
    Changed,
    Contents,
    Difference,
    Fact,
    Group,
    Inspection,
    ModuleFacts,
    ModulePair,
    TensorFacts,
    mean,
)
from lora_forensics.records import Finding
from lora_forensics.reports.terminal import FINDING_LABELS, Page
from lora_forensics.reports.text import count, number, plain

_MANY = 12
"""Lines of a list before the rest is only counted."""
_TOPICS = {"about": "about", "base": "base", "network": "network", "training": "training", "data": "data"}
_TOPICS |= {"hashes": "hashes"}


def inspection_text(
    found: Inspection | Difference | Contents, width: int = 80, color: bool = False, verbose: bool = False
) -> str:
    """One file, the difference of two, or the contents of one; `verbose` lists every module."""
    if isinstance(found, Contents):
        return _contents(found)
    page = Page(width, color)
    if isinstance(found, Inspection):
        _inspection(page, found, verbose)
    else:
        _difference(page, found, verbose)
    return page.text()


def _inspection(page: Page, found: Inspection, verbose: bool) -> None:
    """What the file says, a table of its modules, and what is wrong with it."""
    _head(page, found)
    _facts(page, found.facts, verbose)
    page.blank()
    page.raw(_table(_SUMMARY, list(_summary(found, verbose)), page.width))
    page.blank()
    if verbose:
        page.raw(line for module in found.modules for line in _module(module))
        page.blank()
    _health(page, found)


def _difference(page: Page, found: Difference, verbose: bool) -> None:
    """What differs."""
    for label, one in (("first", found.first), ("second", found.second)):
        page.row(label, f"{plain(one.path)}   {_about(one)}")
    page.blank()
    many = 1 << 30 if verbose else _MANY
    total = found.identical_tensors + found.changed_tensors
    page.row("tensors", f"{found.identical_tensors} of {total} with the same name are identical")
    for label, names in (("only 1st", found.only_first), ("only 2nd", found.only_second)):
        for place, name in enumerate(names[:many]):
            page.row("" if place else label, plain(name), elide=True)
        if len(names) > many:
            page.row("", f"and {len(names) - many} more modules", style="quiet")
    aspects = Counter(_changed(change) for pair in found.pairs for change in pair.changed)
    for place, (aspect, times) in enumerate(aspects.most_common(many)):
        page.row("" if place else "modules", f"{aspect} at {count(times, 'module')}")
    for place, entry in enumerate(found.metadata[:many]):
        page.row("" if place else "text", _changed(entry))
    if len(found.metadata) > many:
        page.row("", f"and {len(found.metadata) - many} more keys (-v lists them)", style="quiet")
    page.blank()
    page.raw(_table(_PAIRS, list(_paired(found.pairs, verbose)), page.width))
    for label, one in (("first", found.first), ("second", found.second)):
        for finding in one.findings:
            page.row(label, plain(finding.message))


def _contents(found: Contents) -> str:
    tensors = _tensors(found.tensors) if found.tensors is not None else ""
    return tensors + (_metadata(found.metadata, found.config) if found.metadata is not None else "")


def _tensors(tensors: Sequence[TensorFacts]) -> str:
    """Every tensor: its key, then type, shape and statistics."""
    lines = []
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape)) or "one number"
        sizes = f"mean {_sign(tensor.mean)}, {_sign(tensor.minimum)} to {_sign(tensor.maximum)}"
        sizes += f", abs mean {_sign(tensor.mean_abs)}, abs min {_sign(tensor.min_abs)}"
        damage = f", NaN/Inf {tensor.nonfinite}" if tensor.nonfinite else ""
        lines += [plain(tensor.name), f"  {plain(tensor.dtype)} {shape}, {sizes}{damage}"]
    return "\n".join(lines) + "\n"


def _metadata(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """All metadata, JSON inside of it unfolded, and adapter_config.json."""
    lines = list(_tree(unfolded(metadata), 0))
    if config:
        lines += ["adapter_config.json", *_tree(config, 1)]
    return "\n".join(lines or ["no metadata"]) + "\n"


def _head(page: Page, found: Inspection) -> None:
    page.head(plain(found.path), _about(found))
    dated = [f"step {found.step}"] if found.step is not None else []
    dated += [f"epoch {number(found.epoch)}"] if found.epoch is not None else []
    dated += [f"rate {number(found.learning_rate, 3)}"] if found.learning_rate is not None else []
    dated += [f"loss {number(found.train_loss)}"] if found.train_loss is not None else []
    dated += [f"held-out loss {number(found.held_out_loss)}"] if found.held_out_loss is not None else []
    if found.trainer:
        page.row("trainer", ", ".join([plain(found.trainer), *dated]))


def _about(found: Inspection) -> str:
    modules = count(len(found.modules) + len(found.unread), "module")
    return f"{plain(found.adapter())}, {modules}, {_bytes(found.size)}, {'/'.join(map(plain, found.dtypes()))}"


def _facts(page: Page, facts: Sequence[Fact], verbose: bool) -> None:
    """A line for each topic; hashes, and what is long, only if asked for."""
    for topic, label in _TOPICS.items():
        told = [fact for fact in facts if fact.topic == topic]
        if topic == "hashes" and not verbose:
            continue
        page.row(label, "; ".join(f"{plain(fact.label)} {_clipped(plain(fact.value), verbose)}" for fact in told))


def _clipped(text: str, whole: bool, room: int = 90) -> str:
    return text if whole or len(text) <= room else f"{text[:room]}..."


def _health(page: Page, found: Inspection) -> None:
    base = found.base
    page.row("measured", f"against {plain(_near(base.path))}" if base.path else f"without a base model: {plain(base.problem)}")
    scales = Counter(module.scale_from for module in found.modules)
    said = {"tensor": "told by the file", "configuration": "told by its settings", "convention": "by convention"}
    told = [f"{said.get(source, 'told nowhere')} ({times})" for source, times in scales.most_common()]
    page.row("scale", ", ".join(told))
    if found.other_tensors:
        page.row("others", f"{count(len(found.other_tensors), 'tensor')} of no adapter: {_some(found.other_tensors)}")
    for finding in found.findings:
        _finding(page, finding)
    if not any(finding.severity != "info" for finding in found.findings):
        page.row("health", "no NaN or Inf, every module changes something, nothing out of proportion", style="keep")


def _near(paths: str) -> str:
    """Paths below the working folder as they are typed there."""
    here = f"{Path.cwd()}{os.sep}"
    return " + ".join(path.removeprefix(here) for path in paths.split(" + "))


def _finding(page: Page, finding: Finding) -> None:
    page.row(FINDING_LABELS.get(finding.severity, "note"), plain(finding.message), label_style=finding.severity)
    page.row("", plain(finding.hint), style="quiet")


_SUMMARY = ("module", "kind", "rank", "n", "|D|", "|D|/|W|", "cosine", "s.rank", "strength")
_PAIRS = ("module", "n", "|D1|", "|D2|", "|D2-D1|", "cosine")


def _summary(found: Inspection, sections: bool) -> Iterator[list[str]]:
    """A row for each component, and below it one for each role, or each section."""
    mixed = len({(module.adapter, module.rank) for module in found.modules}) > 1
    for component in found.components():
        yield _cells(component, component.component, mixed)
        for group in found.sections() if sections else found.roles():
            if group.component == component.component:
                yield _cells(group, f"  {group.section if sections else group.role}", mixed)


def _cells(group: Group, name: str, mixed: bool) -> list[str]:
    """A row of the summary; kinds and ranks stand above it already unless they differ."""
    ranks = "-".join(map(str, dict.fromkeys((group.ranks[0], group.ranks[-1])))) if group.ranks else "?"
    sizes = (group.delta_norm, group.relative_norm, group.cosine, group.stable_rank, group.average_strength)
    what = [",".join(map(plain, group.adapters)), ranks] if mixed else ["-", "-"]
    return [_name(name), *what, str(group.modules), *map(_sign, sizes)]


def _name(name: str, room: int = 30) -> str:
    """A name at its depth, and its end where it is long."""
    bare = plain(name)
    depth = len(name) - len(name.lstrip())
    return " " * depth + (bare if len(bare) <= room else f"...{bare[-room:]}")


def _module(module: ModuleFacts) -> Iterator[str]:
    shape = " x ".join("?" if n is None else str(n) for n in module.shape)
    what = [f"{plain(module.adapter)} rank {'?' if module.rank is None else module.rank}"]
    what += [f"scale {_sign(math.nan if module.scale is None else module.scale)}", shape]
    names = {"|D|": "delta_norm", "|D|/|W|": "relative_norm", "cosine": "cosine", "s1": "spectral_norm"}
    names |= {"s.rank": "stable_rank", "e.rank": "effective_rank", "NaN/Inf": "nonfinite"}
    sizes = [f"{k} {_sign(value)}" for k, v in names.items() if not math.isnan(value := module.metric(v))]
    yield f"  {plain(module.module)}"
    yield f"    {', '.join(what)}"
    yield f"    {'  '.join(part for part in sizes if part != 'NaN/Inf 0')}"
    for part in module.parts or ():
        rows = f"  rows {part.rows[0]}-{part.rows[1]}" if part.rows else ""
        yield f"    -> {plain(part.tensor)}{rows}{'  transposed' if module.transposed else ''}"
    if module.parts is None and module.reason:
        yield f"    no base weight: {plain(module.reason)}"


def _paired(pairs: Sequence[ModulePair], verbose: bool) -> Iterator[list[str]]:
    """A row for each component, and below it one for each role, or each module."""
    for component in dict.fromkeys(pair.component for pair in pairs):
        inside = [pair for pair in pairs if pair.component == component]
        yield _pair_cells(component, inside)
        for name in dict.fromkeys(pair.module if verbose else pair.role for pair in inside):
            yield _pair_cells(f"  {name}", [p for p in inside if name in (p.module, p.role)])


def _pair_cells(name: str, pairs: Sequence[ModulePair]) -> list[str]:
    sizes = [mean(p.delta_norms[0] for p in pairs), mean(p.delta_norms[1] for p in pairs)]
    sizes += [mean(p.step_size for p in pairs), mean(p.cosine for p in pairs)]
    return [_name(name), str(len(pairs)), *map(_sign, sizes)]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns as wide as needed, names to the left and numbers to the right: without those where there is nothing to
    say, and without the last ones that do not fit."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    while kept:
        lines = [[row[i] for i in kept] for row in (header, *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if sum(widths) + 2 * len(widths) <= width or len(kept) <= 2:
            break
        kept.pop()
    else:
        return []
    return [
        "  "
        + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _tree(value: object, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, dict):
        for key, entry in value.items():
            if isinstance(entry, dict | list) and entry and depth < 8:
                yield f"{indent}{plain(key)}"
                yield from _tree(entry, depth + 1)
            else:
                yield f"{indent}{plain(key)}: {plain(entry)}"
    elif isinstance(value, list):
        for entry in value:
            yield from (
                _tree(entry, depth) if isinstance(entry, dict | list) and depth < 8 else [f"{indent}{plain(entry)}"]
            )


def _changed(entry: Changed) -> str:
    one, two = ("none" if v is None else _clipped(plain(v), False, 40) or "''" for v in (entry.first, entry.second))
    return f"{plain(entry.name)}: {one} -> {two}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(plain, names[:3])) + more


def _sign(value: float) -> str:
    return "-" if math.isnan(value) else number(value, 3)


def _bytes(size: int) -> str:
    for unit, digits in (("GB", 30), ("MB", 20), ("kB", 10)):
        if size >= 1 << digits:
            return f"{size / (1 << digits):.3g} {unit}"
    return f"{size} bytes"
