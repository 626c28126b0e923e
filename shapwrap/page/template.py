"""From parts to one HTML file that loads nothing and runs no script but its own."""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

SCRIPTS = (
    "numbers.js",
    "class_store.js",
    "colors.js",
    "patch_map.js",
    "sum_bar.js",
    "class_picker.js",
    "value_table.js",
    "image_card.js",
    "report.js",
)
"""In the order in which they need each other."""


def assemble(title: str, data: dict[str, Any]) -> str:
    """The page.

    Args:
        title: Plain text.
        data: What JSON can say; numbers are finite.
    """
    style = _part("report.css")
    script = "(() => {\n" + '"use strict";\n' + "".join(map(_part, SCRIPTS)) + "})();\n"
    # Whatever a name contains, no other script runs and nothing is fetched.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": _script_data(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("report.html"))


def _script_data(data: dict[str, Any]) -> str:
    """JSON that no parser of HTML ends early."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _part(name: str) -> str:
    return files("shapwrap.page").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
