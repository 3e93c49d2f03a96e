"""Text of models, data and users on its way into HTML: nothing in it may become markup, script or a broken file."""

from __future__ import annotations

import html
import json
from typing import Any

# C0 controls other than tab and line feed, and DEL, become their visible pictures; a lone surrogate, which UTF-8
# cannot hold, the replacement character.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def clean(text: object) -> str:
    """As text that UTF-8 and HTML can hold, what is invisible made visible."""
    return str(text).replace("\r\n", "\n").translate(_VISIBLE)


def escape(text: object) -> str:
    """For element content and for attribute values in double quotes."""
    return html.escape(clean(text), quote=True)


def embed_json(value: Any) -> str:
    """For the content of a <script type="application/json">: no `<` that could end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
