"""Reports: one module a variant, one line in `REPORTS`.

A report sees a `Summary` and nothing else; text in it that came from files is data, and is escaped by the report.
"""

from __future__ import annotations

from lora_forensics.reports.github import GitHubReport
from lora_forensics.reports.interface import Report
from lora_forensics.reports.json import JsonReport, to_json
from lora_forensics.reports.junit import JUnitReport
from lora_forensics.reports.markdown import MarkdownReport
from lora_forensics.reports.sarif import SarifReport
from lora_forensics.reports.terminal import TerminalReport

REPORTS: dict[str, type[Report]] = {
    "terminal": TerminalReport,
    "markdown": MarkdownReport,
    "json": JsonReport,
    "github": GitHubReport,
    "junit": JUnitReport,
    "sarif": SarifReport,
}
"""Every report by its name in `--report`; first line = what a person sees."""

__all__ = [
    "REPORTS",
    "GitHubReport",
    "JUnitReport",
    "JsonReport",
    "MarkdownReport",
    "Report",
    "SarifReport",
    "TerminalReport",
    "to_json",
]
