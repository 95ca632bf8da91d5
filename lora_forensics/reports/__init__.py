"""Reports: one module a variant, one line in `REPORTS`.

A report sees a `Summary` and nothing else; text in it that came from files is data, and is escaped by the report.
"""

from __future__ import annotations

from lora_forensics.reports.interface import Report
from lora_forensics.reports.json import JsonReport, to_json
from lora_forensics.reports.markdown import MarkdownReport
from lora_forensics.reports.terminal import TerminalReport

REPORTS: dict[str, type[Report]] = {
    "terminal": TerminalReport,
    "markdown": MarkdownReport,
    "json": JsonReport,
}
"""Every report by its name in `--report`; first line = what a person sees."""

__all__ = ["REPORTS", "JsonReport", "MarkdownReport", "Report", "TerminalReport", "to_json"]
