r"""Finds the final answer in a completion.

Every search here takes time linear in the text, because completions of several megabytes are graded, and a model may
write a million opening braces.
"""

from __future__ import annotations

import re

# A model that writes on after its turn invents the next speaker; what that speaker says is not the model's answer.
_CHAT_MARKER = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text)\|>|</s>")
_BOXES = ("\\boxed", "\\fbox")
_BRACE = re.compile(r"\s*\{")
_STRUCTURE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\s+([^\s${}\\]{1,100})")
_HASHES = "####"
_ANSWER_PHRASE = re.compile(
    r"(?:\b[Ff]inal\s{1,9}[Aa]nswer\b|\bFINAL ANSWER\b|\bA(?:nswer|NSWER)\b)(?:\s{1,9}is\b)?|\banswer\s{1,9}is\b"
)
_MATH_SPAN = re.compile(
    r"\$\$(?P<display>[^$]{1,2000})\$\$|(?<!\\)\$(?P<inline>(?:[^$\\]|\\.){1,2000})\$"
    r"|\\\((?P<paren>(?:[^\\]|\\(?![()])){1,2000})\\\)|\\\[(?P<bracket>(?:[^\\]|\\(?![\[\]])){1,2000})\\\]",
    re.DOTALL,
)
# "$5 and $" in "costs $5 and $6" are two prices, not a formula; so is "$5 + $" in "$5 + $6".
_PRICE = re.compile(r"\s*\d[\d,.]*\s+[A-Za-z]{2,}|\s*\d[^=]*[-+=*/]\s*$")
_JOINT = re.compile(r"\s*(?:,|,?\s*(?:or|and)\b)\s*")
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+\u2212])?(?<![A-Za-z0-9_])\\?\$?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)
_COMMAND = re.compile(
    r"\\(?:begin|end)\{\w+\*?\}(?:\{[lcr|\s]*\})?|\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_FUNCTION_WORDS = frozenset(
    re.findall("[a-z]+", "sin cos tan cot sec csc log ln exp sqrt pi mod or and gcd lcm min max det")
)
# Words that lead to an answer without being part of it.
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|about|approximately|roughly|simply|just|exactly|is|are|be|equals?|we|get|have)\b"
    r"[\s,:]*)+",
    re.IGNORECASE,
)
# Marks of program code, which answers do not hold: a number beside one is an argument of a call, not the answer.
_PROGRAM = re.compile(
    r"__\w|[A-Za-z_]\.[A-Za-z_]\w*\(|\b(?:import|lambda|eval|exec|system|globals|getattr|compile)\b|\\(?:write|input)"
)
# "5, not 6" means 5, and so does "5 (" before a reason. "either 5 or 6" and "not 5" do not settle on an answer.
_ASIDE = re.compile(r",?\s+(?:(?:but\s+)?not|rather\s+than|instead\s+of)\s|\s\(\s*$", re.I)
_HEDGE = re.compile(r"^\s*(?:either|neither|not|maybe|perhaps|possibly)\b|\d\$?,?\s+or\s+\$?-?\d", re.I)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\b(?:because|since|as|which|where)\b")
# A longer text is prose, not a bare answer. Only this much at the end of a text is searched for formulas and numbers.
_MAX_BARE = 300
_TAIL = 20_000


def extract_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} or \fbox{} (the innermost of nested ones); None without one or if it is cut off."""
    text = _own_turn(text)
    start = _last_box(text)
    if start is None:
        return None
    brace = _BRACE.match(text, start)
    if brace is None:
        bare = _BARE_BOX.match(text, start)
        return bare[1].rstrip(".,") or None if bare else None
    start = brace.end()
    depth = 1
    # An escaped brace is a symbol of the answer, not structure.
    for mark in _STRUCTURE.finditer(text, start):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return text[start : mark.start()].strip() or None
    return None


def extract_auto(text: str) -> str | None:
    """The final answer of free text: a box, else "####", else "Answer"/"answer is", else the last math span, else
    the whole text when it is a bare answer, else its last number. None when there is none of these."""
    text = _own_turn(text)
    if _last_box(text) is not None:
        return extract_boxed(text)
    _, hashes, rest = text.rpartition(_HASHES)
    if hashes and (line := _first_line(rest)):
        return _trim(line)
    phrases = _ANSWER_PHRASE.finditer(text) if "nswer" in text or "NSWER" in text else ()
    after = max((phrase.end() for phrase in phrases), default=None)
    if after is not None and (answer := _after_phrase(text[after : after + _TAIL])):
        return answer
    tail = text[-_TAIL:]
    if spans := _math_spans(tail):
        return spans[-1][1]
    if _is_bare(_without_lead(text)):
        return _trim(_without_lead(text))
    return _last_number(tail)


EXTRACTORS = {"boxed": extract_boxed, "auto": extract_auto}


def _own_turn(text: str) -> str:
    # Every marker begins with "<": megabytes without one need no search with a regular expression.
    marker = _CHAT_MARKER.search(text) if "<" in text else None
    return text[: marker.start()] if marker else text


def _last_box(text: str) -> int | None:
    """The position after the command of the last box; a box with braces goes before one without. None without a box."""
    braced: list[int] = []
    bare: list[int] = []
    for command in _BOXES:
        start = text.rfind(command)
        while start >= 0:
            after = start + len(command)
            if _BRACE.match(text, after):
                braced.append(after)
                break
            if not bare and _BARE_BOX.match(text, after):
                bare.append(after)
            start = text.rfind(command, 0, start)
    return max(braced or bare, default=None)


def _after_phrase(tail: str) -> str | None:
    """The answer in the text after "the answer is": a formula at its start, else the last formula or number of the
    sentence, else the words of the sentence."""
    tail = tail.lstrip(" \t\r\n*_:=")
    if spans := _leading_spans(tail):
        return spans
    line = _first_line(tail)
    if not line:
        return None
    end = _SENTENCE_END.search(line)
    sentence = _without_lead(line[: end.start()] if end else line)
    aside = _ASIDE.search(sentence)
    if aside and any(map(str.isdigit, sentence[: aside.start()])):
        sentence = sentence[: aside.start()]
    if _HEDGE.search(sentence):
        return _trim(sentence)
    if _is_bare(sentence) or _PROGRAM.search(sentence):
        return _trim(sentence)
    spans_in_it = _math_spans(sentence)
    numbers = list(_NUMBER.finditer(sentence))
    last_span = spans_in_it[-1][0] if spans_in_it else -1
    if numbers and numbers[-1].end() > last_span:
        return numbers[-1].group()
    return spans_in_it[-1][1] if spans_in_it else _trim(sentence)


def _leading_spans(text: str) -> str | None:
    """The formula at the start of a text. Those joined by "or", "and" or a comma are one answer, even a hedged one."""
    found: list[str] = []
    position = 0
    while (span := _MATH_SPAN.match(text, position)) and not _PRICE.match(_content(span)):
        found.append(_content(span).strip())
        joint = _JOINT.match(text, span.end())
        if joint is None:
            break
        position = joint.end()
    return ", ".join(filter(None, found)) or None


def _last_number(text: str) -> str | None:
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    start = text.rfind("\n", 0, numbers[-1].start()) + 1
    end = text.find("\n", numbers[-1].end())
    line = text[start : end if end >= 0 else len(text)]
    return None if _PROGRAM.search(line) else numbers[-1].group()


def _math_spans(text: str) -> list[tuple[int, str]]:
    """(end, content) of every formula, in order."""
    found = ((match.end(), _content(match)) for match in _MATH_SPAN.finditer(text))
    return [(end, content.strip()) for end, content in found if content.strip() and not _PRICE.match(content)]


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)


def _is_bare(text: str) -> bool:
    """Whether a text is an answer with nothing around it: besides LaTeX and function names it has at most one word,
    which is a unit after the value or a name before "="."""
    if len(text) > _MAX_BARE or not text.strip():
        return False
    plain = _COMMAND.sub(" ", text).strip(" \t\r\n*_.")
    words = [word for word in _WORD.finditer(plain) if word[0] not in _FUNCTION_WORDS]
    if len(words) != 1:
        return not words
    before, after = plain[: words[0].start()], plain[words[0].end() :]
    return (
        after.lstrip().startswith(("=", "(")) or not re.search(r"[\w\\]", after) or not re.search(r"\d", before + after)
    )


def _without_lead(text: str) -> str:
    lead = _LEAD.match(text.lstrip())
    return text.lstrip()[lead.end() :] if lead else text


def _first_line(text: str) -> str:
    stripped = text.lstrip()
    end = stripped.find("\n")
    return (stripped if end < 0 else stripped[:end]).strip()


def _trim(text: str) -> str | None:
    """The text without Markdown emphasis and a full stop at its end; None when nothing is left."""
    return text.strip().strip("*_` \t").lstrip("=").rstrip(".").strip().strip("`*") or None
