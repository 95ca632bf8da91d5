"""Commands: parse, call the library, print, exit code. No rule lives here, nothing heavy is imported at the top."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import click

from lora_forensics import __version__
from lora_forensics.commands import (
    average,
    check,
    compare,
    inspect,
    pick,
    probe,
    prune,
    reference,
    report,
    rules,
    runs,
    scan,
    table,
)
from lora_forensics.commands.printing import complain
from lora_forensics.errors import LoraForensicsError

EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 2, 70, 130


class Commands(click.Group):
    """The one place where errors become messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; every way out of it has its code."""
        kwargs["standalone_mode"] = False
        typed = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        _repair_streams()
        try:
            result = super().main(*args, **kwargs)
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(EXIT_USAGE)
        except LoraForensicsError as error:
            complain(*_shown(typed, error.message, error.hint))
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            complain("stopped; files on disk are those of the runs that were finished", "run the same command to go on")
            sys.exit(EXIT_INTERRUPTED)
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - a bug must not look like a finding; a panic is no Exception
            with tempfile.NamedTemporaryFile(
                "w", prefix="lora-forensics-", suffix=".log", delete=False, encoding="utf-8"
            ) as log:
                log.write(traceback.format_exc())
            (said,) = _shown(typed, f"this is a bug: {type(error).__name__}: {error}")
            complain(said, f"please report it with {log.name}")
            sys.exit(EXIT_BUG)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that has gone, as in `| head`, is no error. Click would end with 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
            return 0


def _repair_streams() -> None:
    """Let printing never fail: streams that the caller closed, and consoles that cannot spell a name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _shown(typed: Sequence[str], *sentences: str) -> tuple[str, ...]:
    """What an error says, as it may be shown: with `--redact` without paths, names, and what the command was given."""
    if "--redact" not in typed:
        return sentences
    from lora_forensics.records import Summary
    from lora_forensics.redaction import Redaction

    given = [word for word in typed[1:] if not word.startswith("-")]
    return tuple(map(Redaction(Summary(()), given).text, sentences))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-forensics")
def main() -> None:
    """Which checkpoint of a LoRA training to keep, and on what evidence."""


for command in (
    scan.scan,
    runs.runs,
    pick.pick,
    probe.probe,
    report.report,
    inspect.inspect,
    compare.compare,
    average.average,
    prune.prune,
    table.table,
    check.check,
    reference.formats,
    reference.metrics,
    rules.rules,
):
    main.add_command(command)
