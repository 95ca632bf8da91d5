"""`rules`: what each finding means, and what to do."""

from __future__ import annotations

import click


@click.command()
@click.argument("rule", required=False)
@click.option("--markdown", is_flag=True, help="As a Markdown page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def rules(rule: str | None, markdown: bool, as_json: bool) -> int:
    """List the rules whose findings a scan may report, or explain RULE.

    Example: lora-forensics rules nonfinite
    """
    import shutil

    from lora_forensics.rule_pages import rules_json, rules_markdown, rules_text

    width = max(40, min(shutil.get_terminal_size((80, 24)).columns, 200))
    click.echo(rules_json(rule) if as_json else rules_markdown() if markdown else rules_text(width, rule), nl=False)
    return 0
