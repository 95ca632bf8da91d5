"""Reports: one module a variant, one line in `REPORTS`.

A report sees a `Summary` and nothing else; text in it that came from files is data, and is escaped by the report.
"""

from __future__ import annotations

from contextlib import suppress

from lora_forensics.errors import UsageError
from lora_forensics.reports.github import GitHubReport
from lora_forensics.reports.html import HtmlReport
from lora_forensics.reports.interface import PagedReport, Report
from lora_forensics.reports.json import JsonReport, to_json
from lora_forensics.reports.junit import JUnitReport
from lora_forensics.reports.markdown import MarkdownReport
from lora_forensics.reports.sarif import SarifReport
from lora_forensics.reports.terminal import TerminalReport

REPORTS: dict[str, type[Report]] = {
    "terminal": TerminalReport,
    "markdown": MarkdownReport,
    "json": JsonReport,
    "html": HtmlReport,
    "github": GitHubReport,
    "junit": JUnitReport,
    "sarif": SarifReport,
}
"""Every report by its name in `--report`; first line = what a person sees."""


def available() -> tuple[str, ...]:
    """Names of the reports whose extras are installed."""
    names = []
    for name, report in REPORTS.items():
        made = report()
        with suppress(UsageError):
            if isinstance(made, PagedReport):
                made.check()
            names.append(name)
    return tuple(names)


__all__ = [
    "REPORTS",
    "GitHubReport",
    "HtmlReport",
    "JUnitReport",
    "JsonReport",
    "MarkdownReport",
    "PagedReport",
    "Report",
    "SarifReport",
    "TerminalReport",
    "available",
    "to_json",
]
