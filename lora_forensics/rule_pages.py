"""The table of rules for people: in the terminal, as docs/rules.md, as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict

from lora_forensics.failures import FAILURES
from lora_forensics.records import SCHEMA
from lora_forensics.reports.json import to_json
from lora_forensics.rules import RULES, SEVERITIES, Rule, anchor, rule_of


def rules_json(name: str | None = None) -> str:
    """All rules, or one, as one document.

    Raises:
        UsageError: there is no such rule.
    """
    chosen = RULES if name is None else {name: rule_of(name)}
    return to_json(
        {"schema": SCHEMA, "rules": {rule: {**asdict(r), "docs": anchor(rule)} for rule, r in chosen.items()}}
    )


def rules_text(width: int = 80, name: str | None = None) -> str:
    """All rules by severity, a line each; or all that is known of one.

    Raises:
        UsageError: there is no such rule.
    """
    if name is not None:
        return _explained(name, rule_of(name), width)
    lines = []
    longest = max(map(len, RULES))
    for severity in reversed(SEVERITIES):
        lines += [severity, ""]
        for rule, entry in RULES.items():
            if entry.severity == severity:
                lines += textwrap.wrap(
                    entry.about,
                    width,
                    initial_indent=f"  {rule:{longest}}  ",
                    subsequent_indent=" " * (longest + 4),
                )
        lines.append("")
    return "\n".join(lines)


def _explained(name: str, rule: Rule, width: int) -> str:
    lines = [f"{name} ({_severities(rule)})"]
    for label, said in (("saw", rule.about), ("why", rule.why), ("fix", rule.fix), ("source", rule.source)):
        if said:
            lines += textwrap.wrap(
                said,
                width,
                initial_indent=f"  {label:8}",
                subsequent_indent=" " * 10,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines) + "\n"


def rules_markdown() -> str:
    """The page docs/rules.md."""
    lines = [
        "# Rules",
        "",
        "What a scan may find, one heading a rule. Made by `lora-forensics rules --markdown` from the code's table.",
        "`--fail-on`, `--select` and `--ignore` take a rule, the beginning of one (`base-*`), or a severity;",
        "severities and bounds can be set in a [configuration file](configuration.md). In JSON every finding names its",
        "heading here; `-v` adds the rule to each in the terminal, and `lora-forensics rules RULE` prints what",
        "stands below.",
        "",
        "| rule | severity | what |",
        "|---|---|---|",
    ]
    lines += [f"| [`{name}`](#{name}) | {_severities(rule)} | {_literal(rule.about)} |" for name, rule in RULES.items()]
    lines += ["", "## Which rule catches what people report", "", *_failures()]
    for name, rule in RULES.items():
        lines += ["", f"## {name}", "", f"*{_severities(rule)}*: {_literal(rule.about)}.", "", _literal(rule.why), ""]
        lines.append(f"**Fix.** {_literal(rule.fix)}")
        if rule.source:
            lines += ["", f"Source: {rule.source}"]
    return "\n".join(lines) + "\n"


def _failures() -> list[str]:
    lines = [
        "Reports from the trackers of trainers and tools. Where no rule can help, the row says why.",
        "",
        "| people report | for example | caught by |",
        "|---|---|---|",
    ]
    for failure in FAILURES:
        links = ", ".join(f"[{name}]({url})" for name, url in failure.links())
        caught = ", ".join(f"[`{rule}`](#{rule})" for rule in failure.rules)
        lines.append(f"| {failure.what} | {links} | {'; '.join(filter(None, (caught, failure.note)))} |")
    return lines


def _severities(rule: Rule) -> str:
    return " or ".join((rule.severity, *rule.softer))


def _literal(said: str) -> str:
    """Text in which Markdown sees no tags or cells."""
    return said.replace("<", "\\<").replace("|", "\\|")
