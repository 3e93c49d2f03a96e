"""The question of a row: text, or chat messages that end with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dphrl.config.data import DatasetConfig
from dphrl.data.source import Row, as_text, find_value, opened, read_text

# As pandas writes an array of messages into a .csv: without commas between them.
_PRINTED_MESSAGES = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content)['\"]\s*:")


class Message(NamedTuple):
    """One turn of a chat. role: as the data set names it; the model's chat template decides which roles there are."""

    role: str
    content: str


def read_question(row: Row, field: str, dataset: DatasetConfig) -> tuple[str, tuple[Message, ...]]:
    """The question, and the turns before it: a system turn, examples; none if the field holds text.

    Messages may be stored as text: as JSON, or as Python prints them. Raises ValueError, with file, line and remedy,
    for an empty question, and for a field that holds neither text nor messages.
    """
    try:
        messages = read_messages(opened(find_value(row.fields, field)))
    except ValueError as error:
        raise ValueError(
            f"{row.location}: {field!r} {error}; mend the row, or set prompt_field of data set {dataset.name} to "
            "another field"
        ) from None
    text = messages[-1].content if messages else read_text(row, field, dataset, "prompt_field")
    if _PRINTED_MESSAGES.match(text):
        raise ValueError(
            f"{row.location}: {field!r} holds chat messages that were printed and cannot be read back; write them to a "
            ".parquet or .jsonl file"
        )
    if not text.strip():
        raise ValueError(f"{row.location}: the question ({field!r}) is empty; remove the row")
    return text, tuple(messages[:-1]) if messages else ()


def read_messages(value: object) -> list[Message] | None:
    """The messages of a list of {role, content}; None if it is no such list.

    A content may be a list of text parts, {type: text, text}, which are joined. Raises ValueError, a clause without
    place, for messages that cannot be a prompt: one without text, or a last turn that is not the user's.
    """
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn for turn in value):
        return None
    messages = [Message(turn["role"], _content(turn["content"], turn["role"])) for turn in value]
    if messages[-1].role != "user":
        raise ValueError(f"ends with a turn of {messages[-1].role!r}, but a prompt ends with the user's")
    return messages


def _content(content: Any, role: str) -> str:
    is_parts = isinstance(content, list) and all(isinstance(part, Mapping) for part in content)
    parts = [part.get("text") for part in content] if is_parts else [content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"has a turn of {role!r} whose content is not text")
    # Messages are used as they are, blanks at the ends included; this only refuses what no tokenizer takes.
    as_text("".join(parts))
    return "".join(parts)
