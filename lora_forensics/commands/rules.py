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
    from lora_forensics.console import terminal_width
    from lora_forensics.rule_pages import rules_json, rules_markdown, rules_text

    click.echo(
        rules_json(rule) if as_json else rules_markdown() if markdown else rules_text(terminal_width(), rule), nl=False
    )
    return 0
