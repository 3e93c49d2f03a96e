r"""Reads an answer from a stretch of prose: a sentence, a line, or the end of a text.

Every search takes time linear in the text, which the caller bounds where that is not enough.
"""

from __future__ import annotations

import re

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
# Emphasis of Markdown or HTML. In 2**3 + 4**5 the stars are powers, so they stand at the edge of a word.
_EMPHASIS = re.compile(
    r"(?<![A-Za-z0-9)\]}*])\*{2,3}(?=[^\s*])(?P<stars>(?:[^*\n]|\*(?!\*)){1,200})(?<=\S)\*{2,3}(?![A-Za-z0-9(*])"
    r"|<(?:b|strong)>(?P<html>[^<\n]{1,200})</(?:b|strong)>"
)
# "**1.** First," and "**Result:** ..." are headings.
_LIST_NUMBER = re.compile(r"\d+[.)]")
_HEADING_END = (":", "\uff1a")
_PERCENT = re.compile(r"\s?\\?%")
_COMMAND = re.compile(
    r"\\(?:begin|end)\{\w+\*?\}(?:\{[lcr|\s]*\})?|\\(?:text|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
# Letters of scripts in which no mathematics is written, from Cyrillic to Hangul: they are words too.
_FOREIGN = re.compile(r"[\u0400-\u1eff\u3040-\ud7ff]")
_FUNCTION_WORDS = frozenset(
    re.findall("[a-z]+", "sin cos tan cot sec csc log ln exp sqrt pi mod or and gcd lcm min max det")
)
# Words that lead to an answer without being part of it.
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|about|approximately|roughly|simply|just|exactly|is|are|be|equals?|we|get|have|obtain|find)\b"
    r"[\s,:]*)+",
    re.IGNORECASE,
)
# Marks of program code, which answers do not hold: a number beside one is an argument of a call, not the answer.
_PROGRAM = re.compile(
    r"__\w|[A-Za-z_]\.[A-Za-z_]\w*\(|\b(?:import|lambda|eval|exec|system|globals|getattr|compile)\b|\\(?:write|input)"
)
# "5, not 6" means 5, and so does "5 (" before a reason. "either 5 or 6" and "not 5" do not settle on an answer.
_ASIDE = re.compile(r",?\s+(?:(?:but\s+)?not|rather\s+than|instead\s+of)\s|\s\(\s*$|[,\uff0c]\s*\u4e0d\u662f", re.I)
_HEDGE = re.compile(
    r"^\s*(?:(?:either|neither|not|maybe|perhaps|possibly|between)\b|\u4e0d)|\d\$?,?\s+or\s+\$?-?\d",
    re.I,
)
_UNSETTLED = re.compile(
    r"(?:\d\$?,?\s{1,3}or|not(?:\s{1,3}be)?|n't\s{1,3}be|\bpoint|(?:more|less|greater|fewer)\s{1,3}than)\s{1,3}\Z", re.I
)
# "at least 5" and "over 5 people", but not "over 4 weeks she ran 5 miles".
_BOUND = re.compile(
    r"^\s*(?:(?:at|no)\s+(?:least|most|more|less)|(?:more|less|fewer|greater|larger|smaller)\s+than|over|under|above"
    r"|below|up\s+to)\b\D{0,4}\d[\d.,/]*\D*$",
    re.I,
)
# "5 plus one" and "5 base eight" are not 5. The words after such a number stay with it.
_COUNT = "(?:an?\\s+)?(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|third|quarter)"
_GOES_ON = re.compile(
    rf"(?<=\d)\s+(?:(?:percent\s+of|to|and|by|over|times|out\s+of|less\s+than|more\s+than|(?:\w+\s+)?below)\s+{_COUNT}|base"
    r"|to\s+the\s+(?:\w+\s+)?power|plus|minus|point|divided|multiplied|squared|cubed|factorial|(?:st|nd|rd|th)\s+root|negative|double|triple|is\s+(?:not|wrong|incorrect|too))\b",
    re.I,
)
# "5 apples and six oranges", at the end.
_AND_MORE = re.compile(rf"(?<=\d)\s+[a-z]+\s+(?:[a-z]+\s+)?(?:and|plus|or)\s+{_COUNT}\b\D*$", re.I)
_OPTION = re.compile(r"^\s*(?:the\s+)?(?:option|choice)\s+\(?[A-J]\b")
# "The answer is 5 million" is not 5 either.
_SCALED = re.compile(
    r"\d\s+(?:(?:dozen|gross|lakh|crore|hundred|thousand|million|billion|trillion|quadrillion)(?:th)?s?"
    r"|halves|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|sixteenth)s|reciprocal)\b",
    re.I,
)
# A heading that a cut-off text ends with.
_STEP = re.compile(r"[\s#*]*(?:step|part|case|question|problem|example|method|option)\s+\d+[\s.:*]*", re.I)
# In \! the sign is a blank, and in "5! + 1" it is a factorial.
_SENTENCE_END = re.compile(
    r"(?<!\\)(?:[.?](?:[\s*]|$)|!(?=\**\s+[A-Z]|[\s*]*$))|[\u3002\uff01\uff1f]|\b(?:because|since|as|which|where)\b"
)
_FULL_STOPS = ".\u3002"
# What stands between a phrase such as "the answer is" and the answer, besides emphasis.
_BEFORE_ANSWER = " \t\r\n_:=\uff1a\u2192\u21d2"
# A longer text is prose, not a bare answer.
_MAX_BARE = 300


# Where one of these is in a sentence, its number alone is not the answer.
_NOT_THE_NUMBER = (_OPTION, _HEDGE, _BOUND, _PROGRAM, _GOES_ON, _AND_MORE, _SCALED)


def final_answer(text: str) -> tuple[str, str] | None:
    """(answer, which part it is) of text without any other sign: its last formula, or what is bold beside or after
    that; else the whole text when it is a bare answer; else its last number. None when there is none of these."""
    spans, bold = _math_spans(text), _last_bold(text)
    # "x = **3** or **4**" is one answer; "the sum is **3**" has words around it.
    around = _EMPHASIS.sub(" ", text) if bold else ""
    whole = "" if spans or _words(around) or _FOREIGN.search(around) else without_lead(text)
    if is_bare(whole) and (answer := trim(whole)):
        return answer, "whole text"
    # Emphasis marks the answer of a line whose formulas give the reason.
    if bold and (not spans or bold[0] > text.rfind("\n", 0, spans[-1][0])):
        return bold[1], "bold"
    if spans:
        return spans[-1][1], "formula"
    number = _last_number(text)
    return (number, "last number") if number else None


def after_phrase(tail: str) -> str | None:
    """The answer in the text after "the answer is": a formula at its start, else what is bold, the last formula or the
    last number of the sentence, else the words of the sentence."""
    tail = tail.lstrip(_BEFORE_ANSWER)
    opened = tail.lstrip(_BEFORE_ANSWER + "*")
    if spans := _leading_spans(opened):
        return spans
    line = first_line(opened)
    if not line:
        return None
    sentence = without_lead(_sentence(line))
    aside = _ASIDE.search(sentence)
    if aside and any(map(str.isdigit, sentence[: aside.start()])):
        sentence = sentence[: aside.start()]
    if any(sign.search(sentence) for sign in _NOT_THE_NUMBER) or is_bare(sentence):
        return trim(sentence)
    # The stars before the answer may be the beginning of its emphasis or the end of that of the phrase.
    if bold := _last_bold(_sentence(first_line(tail))):
        return bold[1]
    spans_in_it = _math_spans(sentence)
    numbers = list(_NUMBER.finditer(sentence))
    last_span = spans_in_it[-1][0] if spans_in_it else -1
    if numbers and numbers[-1].end() > last_span:
        return numbers[-1].group()
    return spans_in_it[-1][1] if spans_in_it else trim(sentence)


def is_bare(text: str) -> bool:
    """Whether a text is an answer with nothing around it: besides LaTeX and function names it has at most one word,
    which is a unit after the value or a name before "="."""
    if len(text) > _MAX_BARE or not text.strip():
        return False
    if _FOREIGN.search(text) and has_value(text):
        return False
    plain = _COMMAND.sub(" ", text).strip(" \t\r\n*_.")
    words = _words(plain)
    if len(words) != 1:
        return not words
    before, after = plain[: words[0].start()], plain[words[0].end() :]
    return (
        after.lstrip().startswith(("=", "(")) or not re.search(r"[\w\\]", after) or not re.search(r"\d", before + after)
    )


def is_step(line: str) -> bool:
    """Whether a line is a heading such as "Step 5"."""
    return _STEP.fullmatch(line) is not None


def _words(text: str) -> list[re.Match[str]]:
    """The words of a text that are no names of functions, of the Latin alphabet alone."""
    return [word for word in _WORD.finditer(text) if word[0] not in _FUNCTION_WORDS]


def has_value(text: str) -> bool:
    """Whether a text holds a digit or a command of TeX, so that it is more than words."""
    return "\\" in text or any(map(str.isdigit, text))


def without_lead(text: str) -> str:
    lead = _LEAD.match(text.lstrip())
    return text.lstrip()[lead.end() :] if lead else text


def first_line(text: str) -> str:
    stripped = text.lstrip()
    end = stripped.find("\n")
    return (stripped if end < 0 else stripped[:end]).strip()


def trim(text: str) -> str | None:
    """The text without Markdown emphasis and a full stop at its end; None when nothing is left."""
    return (
        without_emphasis(text)
        .strip()
        .strip("*_` \t")
        .removeprefix("=>")
        .lstrip("= \u2192\u21d2\u27f9")
        .rstrip(_FULL_STOPS)
        .strip()
        .strip("`*")
        or None
    )


def without_emphasis(text: str) -> str:
    if "**" not in text and "<" not in text:
        return text
    return _EMPHASIS.sub(lambda match: match["stars"] or match["html"], text)


def _sentence(line: str) -> str:
    end = _SENTENCE_END.search(line)
    return line[: end.start()] if end else line


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


def _last_bold(text: str) -> tuple[int, str] | None:
    """(end, content) of the last emphasis that is an answer: a bare value, or the last words of the text."""
    for match in reversed(list(_EMPHASIS.finditer(text))):
        content = (match["stars"] or match["html"]).strip()
        rest = text[match.end() :]
        if not content.rstrip(_FULL_STOPS):
            continue
        if content.endswith(_HEADING_END) or rest.startswith(_HEADING_END) or _LIST_NUMBER.fullmatch(content):
            continue
        if is_bare(content) and (has_value(content) or not rest.strip(" \t\r\n.!" + _FULL_STOPS)):
            percent = _PERCENT.match(rest)
            return match.end(), content.rstrip(_FULL_STOPS) + (percent[0] if percent else "")
    return None


def _last_number(text: str) -> str | None:
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return None
    start = text.rfind("\n", 0, numbers[-1].start()) + 1
    end = text.find("\n", numbers[-1].end())
    line = text[start : end if end >= 0 else len(text)]
    last = numbers[-1]
    unsettled = _UNSETTLED.search(text, start, last.start()) or any(
        more.match(text, last.end()) for more in (_GOES_ON, _AND_MORE)
    )
    if unsettled or _PROGRAM.search(line) or is_step(line):
        return None
    # "84 / 12 = 7 dozen eggs" counts dozens.
    scale = None if text[: last.start()].rstrip().endswith("=") else _SCALED.match(text, last.end() - 1)
    return text[last.start() : scale.end()] if scale else last.group()


def _math_spans(text: str) -> list[tuple[int, str]]:
    """(end, content) of every formula, in order."""
    found = ((match.end(), _content(match)) for match in _MATH_SPAN.finditer(text))
    return [(end, content.strip()) for end, content in found if content.strip() and not _PRICE.match(content)]


def _content(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)
