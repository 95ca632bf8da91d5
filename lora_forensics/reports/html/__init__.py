"""The HTML report: one page a run and one index, each a single file that asks nothing of any network."""

from lora_forensics.reports.html.report import HtmlReport

__all__ = ["HtmlReport"]
