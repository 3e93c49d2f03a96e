r"""Where in a completion its final answer stands.

Every search here is linear in the text: completions of several megabytes are graded, and a model is free to write
a million opening braces.
"""

from __future__ import annotations

import re

# A model that runs on past its turn invents the next speaker; what that one says is not its answer.
_CHAT_MARKER = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text)\|>|</s>")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = "####"
_ANSWER_PHRASE = re.compile(
    r"(?:\b[Ff]inal\s{1,9}[Aa]nswer\b|\bFINAL ANSWER\b|\bA(?:nswer|NSWER)\b)(?:\s{1,9}is\b)?|\banswer\s{1,9}is\b"
)
_MATH_SPAN = re.compile(
    r"\$\$(?P<display>[^$]{1,2000})\$\$|(?<!\\)\$(?P<inline>(?:[^$\\]|\\.){1,2000})\$"
    r"|\\\((?P<paren>(?:[^\\]|\\(?![()])){1,2000})\\\)|\\\[(?P<bracket>(?:[^\\]|\\(?![\[\]])){1,2000})\\\]",
    re.DOTALL,
)
# "$5 and $" in "costs $5 and $6" are two prices, not a formula.
_PRICE = re.compile(r"\s*\d[\d,.]*\s+[A-Za-z]{2,}")
_NUMBER = re.compile(r"(?:(?<![\w.)\]}])[-+\u2212])?\\?\$?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%)?")
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_FUNCTION_WORDS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "sqrt",
        "pi",
        "mod",
        "or",
        "and",
        "gcd",
        "lcm",
        "min",
        "max",
        "det",
    ]
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# Beyond this a line is prose, and only the end of a long text is searched for spans and numbers.
_MAX_BARE = 300
_TAIL = 20_000


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{}, innermost of nested ones; None without one or when it is cut off."""
    text = _own_turn(text)
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace is a symbol of the answer, not structure
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip() or None
        position += 1
    return None


def extract_auto(text: str) -> str | None:
    """The final answer of free text: a box, else "####", else "Answer"/"answer is", else the last math span, else
    the whole text when it is a bare answer, else its last number. None when there is nothing of these."""
    text = _own_turn(text)
    if _BOX.search(text):
        return extract_boxed(text)
    _, hashes, rest = text.rpartition(_HASHES)
    if hashes and (line := _first_line(rest)):
        return _trim(line)
    after = max((phrase.end() for phrase in _ANSWER_PHRASE.finditer(text)), default=None)
    if after is not None and (answer := _after_phrase(text[after : after + _TAIL])):
        return answer
    tail = text[-_TAIL:]
    if spans := _math_spans(tail):
        return spans[-1][1]
    if _is_bare(text):
        return _trim(text)
    numbers = _NUMBER.findall(tail)
    return numbers[-1] if numbers else None


EXTRACTORS = {"boxed": extract_boxed, "auto": extract_auto}


def _own_turn(text: str) -> str:
    marker = _CHAT_MARKER.search(text)
    return text[: marker.start()] if marker else text


def _after_phrase(tail: str) -> str | None:
    """The answer in what follows "the answer is": a formula at once, else the last formula or number of the
    sentence, else the sentence's words."""
    tail = tail.lstrip(" \t\r\n*_:")
    leading = _MATH_SPAN.match(tail)
    if leading and not _PRICE.match(_content(leading)):
        return _content(leading).strip() or None
    line = _first_line(tail)
    if not line:
        return None
    end = _SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    if _is_bare(sentence):
        return _trim(sentence)
    spans = _math_spans(sentence)
    numbers = list(_NUMBER.finditer(sentence))
    last_span = spans[-1][0] if spans else -1
    if numbers and numbers[-1].end() > last_span:
        return numbers[-1].group()
    return spans[-1][1] if spans else _trim(sentence)


def _math_spans(text: str) -> list[tuple[int, str]]:
    """(end, content) of every formula, in order."""
    found = ((match.end(), _content(match)) for match in _MATH_SPAN.finditer(text))
    return [(end, content.strip()) for end, content in found if content.strip() and not _PRICE.match(content)]


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)


def _is_bare(text: str) -> bool:
    """Whether a text is an answer with nothing around it: at most one word apart from LaTeX and function names."""
    if len(text) > _MAX_BARE or not text.strip():
        return False
    words = _WORD.findall(_COMMAND.sub(" ", text))
    return sum(word not in _FUNCTION_WORDS for word in words) <= 1


def _first_line(text: str) -> str:
    stripped = text.lstrip()
    end = stripped.find("\n")
    return (stripped if end < 0 else stripped[:end]).strip()


def _trim(text: str) -> str | None:
    """Without Markdown emphasis and a closing full stop."""
    return text.strip().strip("*_ \t").rstrip(".").strip() or None
