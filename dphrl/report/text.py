"""Makes text of models, data and users safe for HTML: it cannot become markup or script, or break the file."""

from __future__ import annotations

import html
import json
from typing import Any

# DEL and the C0 controls other than tab and line feed become their visible pictures. C1 controls, and lone surrogates,
# which UTF-8 cannot hold, become the replacement character.
_VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def clean(text: object) -> str:
    """The value as text that UTF-8 and HTML can hold, with control characters made visible."""
    return str(text).replace("\r\n", "\n").translate(_VISIBLE)


def escape(text: object) -> str:
    """The value as text for the content of an element, or for an attribute value in double quotes."""
    return html.escape(clean(text), quote=True)


def embed_json(value: Any) -> str:
    """JSON for the content of a <script type="application/json">, without any `<` that could end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
