"""index.html for all runs, and report.html for each."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from lora_forensics.errors import UsageError
from lora_forensics.records import Summary
from lora_forensics.redaction import Redaction
from lora_forensics.reports.html.index import index_page
from lora_forensics.reports.html.run import run_page
from lora_forensics.reports.html.tables import RunTables


class HtmlReport:
    """Pages that open by double click; what came from files is text in them, and nothing else."""

    filename: str | None = "index.html"

    def render(self, summary: Summary) -> str:
        """The index of all runs."""
        return index_page(summary)

    def check(self) -> None:
        """Whether the charts can be made.

        Raises:
            UsageError: the extra is missing.
        """
        if any(find_spec(module) is None for module in ("vl_convert", "PIL")):
            raise UsageError("the HTML report needs vl-convert-python and pillow", "pip install 'lora-forensics[html]'")

    def pages(self, summary: Summary, hidden: Redaction | None = None) -> Iterator[tuple[str, str]]:
        """A page for each run."""
        if summary.folder is None:
            return
        self.check()
        for verdict in summary.runs:
            tables = RunTables.read(summary.folder / verdict.run)
            own = verdict if hidden is None else hidden.verdict(verdict)
            shown = tables if hidden is None else tables.renamed(hidden, verdict.step_unit)
            yield f"{own.run}/report.html", run_page(own, shown, summary.versions)
