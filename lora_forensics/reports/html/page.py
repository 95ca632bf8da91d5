"""The shell of a page: escaping, its style and scripts, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

from lora_forensics.reports.json import to_json
from lora_forensics.reports.text import plain


def esc(data: object) -> str:
    """Text from a file: one printable line, without markup."""
    return html.escape(plain(data))


def data_block(name: str, document: dict[str, Any]) -> str:
    """A document for the page's script, in which no sign can end the block."""
    compact = json.dumps(json.loads(to_json(document)), separators=(",", ":"), ensure_ascii=True)
    harmless = compact.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{harmless}</script>'


def document(title: str, body: str, charts: bool = False, data: str = "", own: str = "") -> str:
    """A whole page: `body` and `data` are markup already; `charts` embeds Vega; `own`: other script, more style."""
    style = _file("page.css") + (_file(f"{own}.css") if own else "")
    scripts = [_vega(), "\n".join((_file("embed.js"), _file(f"{own or 'charts'}.js")))] if charts else []
    scripts.append(_file("page.js"))
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    blocks = "".join(f"<script>{script}</script>\n" for script in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{esc(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n{data}\n{blocks}</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8").strip()


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, made by vl-convert without a network."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("Object.assign(window, { vegaEmbed });")
    # an HTML parser must find neither the end of the script nor a comment in it
    bundle = re.sub(r"<(?=/script|script|!--)", r"\\x3C", bundle, flags=re.IGNORECASE)
    return f"(() => {{{bundle}\n}})();"  # none of its names is global
