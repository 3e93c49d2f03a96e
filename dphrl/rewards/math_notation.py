r"""One spelling for TeX that looks alike: commands that only dress, thousands, bases, repeating decimals.

Covered: colours, sizes, fonts, spaces and phantoms (\textcolor{red}{6}, {\Large 6}, \mathbf 5, 6\hspace{1cm}); other
names for fractions and binomials (\nicefrac12, \dbinom52); accents without braces (\vec v); thousands (1{\,}000,
1\text{,}000, 10_000); numerals with a base (110_{\text{two}}, 1010_{(2)}, 1010\text{ in base }2); repeating decimals
(0.\dot{3}, 0.\bar3, 0.(3)); the distance between the rows of a matrix (\\[4pt], \hline).
Not covered: \cancel, \overset and their like, which change what is said; macros that a text defines itself.

Every search takes time linear in the text.
"""

from __future__ import annotations

import re

_TEXT_FONTS = "emph|textsl|textsc|textsf|texttt|textrm|textup|textmd|hbox|underline|uline"
_MATH_FONTS = "boldsymbol|bm|pmb|mathit|mathsf|mathtt|mathnormal"
_OLD_FONTS = "rm|bf|it|sf|tt|sl|em|bfseries|itshape"
_KNOWN_FONTS = "text|textbf|textit|textnormal|mbox|mathrm|mathbf|operatorname"
_FRAMES = (
    "smash|rlap|llap|mathclap|ensuremath|mathord|mathop|mathrel|mathbin|mathinner|boxed|fbox|framebox|Aboxed|tcboxmath"
)
_ACCENTS = "vec|hat|bar|tilde|dot|ddot|overline|widehat|widetilde|overrightarrow"
_NO_LETTER = "(?![A-Za-z])"
# A first look: nearly all answers need none of what `undressed` does.
_DRESSED = re.compile(
    rf"\\(?:{_TEXT_FONTS}|{_MATH_FONTS}|{_OLD_FONTS}|{_FRAMES}|{_ACCENTS}|(?:text)?color|f?colorbox|scalebox|bbox|style|class|cssId|enclose|htmlClass|[hv]space"
    rf"|[hv]?phantom|label|tag|[hm]skip|m?kern|mspace|Bbb|hline|cr|overset|[RNZQC]){_NO_LETTER}"
    rf"|\\(?:{_KNOWN_FONTS})\s*(?:\{{[-\s\d.,]*\}}|[^{{\sa-zA-Z]|\s[^{{]|\{{[^{{}}\\=^<>+]*[\\=^<>+])"
    rf"|^\s*\\(?:mathbf|textbf|textit)\s*\{{[^{{}}]*\d"
    rf"|\\(?:mathbb|mathcal|mathfrak|mathscr)\s*[A-Za-z]{_NO_LETTER}|\\\\\s*[\[*]|\\angle\s*\{{"
)
_COLOUR = re.compile(
    r"\\(?:(?:text)?color|colorbox|scalebox|fcolorbox\s*\{[^{}]*\})\s*(?:\[[^\[\]{}]*\])?\s*\{[^{}]*\}"
    r"|\\bbox\s*(?:\[[^\[\]{}]*\])?|\\(?:style|class|cssId|enclose|htmlClass)\s*\{[^{}]*\}(?=\s*\{)"
)
_SPACE = re.compile(
    r"\\(?:[hv]space\*?|[hv]?phantom|label|tag\*?|mspace)\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
    r"|\\(?:kern|hskip|mkern|mskip)\s*-?[\d.]+\s*(?:pt|em|ex|mu|cm|mm|in)"
)
# {\rm cm} and \rm{cm}
_OLD_FONT = re.compile(
    rf"\{{\s*\\(?P<group>{_OLD_FONTS}){_NO_LETTER}\s?(?P<content>[^{{}}\\]*)\}}|\\(?P<name>{_OLD_FONTS})\s*(?=\{{)"
)
_NUMBER_IN_FONT = re.compile(
    rf"(?P<before>[\^_}}]?)\\(?:{_TEXT_FONTS}|{_MATH_FONTS}|{_KNOWN_FONTS})\s*\{{(?P<number>\s*-?\d[\d.,]*\s*)\}}"
)
_PLAIN_TEXT = re.compile(
    rf"\\(?:(?:{_TEXT_FONTS})\s*(?=\{{[^{{}}\\]*\}})|(?:{_MATH_FONTS})\s*(?=\{{[A-Za-z ]{{2,}}\}}))"
)
_PLAIN_LETTER = re.compile(rf"\\(?:{_MATH_FONTS})\s*(?=\{{\s*[A-Za-z]\s*\}})")
_NAME_OF_FONT = re.compile(
    rf"\\(?:{_TEXT_FONTS}|{_MATH_FONTS}|{_FRAMES}|{_OLD_FONTS}){_NO_LETTER}\s*"
    rf"|\\(?:{_KNOWN_FONTS}){_NO_LETTER}\s*(?![\s{{])"
)
_ACCENT_BARE = re.compile(rf"\\({_ACCENTS})(?:\s*(\d)|\s+([A-Za-z]){_NO_LETTER}|\s*(\\[A-Za-z]+))")
_BLACKBOARD = re.compile(
    rf"\\(?:(mathbb|Bbb|mathcal|mathfrak|mathscr)\s*(?:([A-Za-z]){_NO_LETTER}|(?=\{{))|([RNZQC]){_NO_LETTER})"
)
_STRUCTURE = re.compile(r"\\.|[{}]", re.DOTALL)
_MAX_PAIRS = 4
_ROW_SPACE = re.compile(
    r"(\\\\)(?:\*|\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|cm|mm|in|mu|px|bp|\\baselineskip)\s*\])|\\hline(?![A-Za-z])"
    r"|(\\)cr(?![A-Za-z])"
)
_DOT_ABOVE = re.compile(r"\\overset\s*\{\s*(?:\.|\\cdot|\\bullet)\s*\}\s*\{\s*(\d)\s*\}")
_POINTS = re.compile(r"\\angle\s*\{\s*([A-Za-z]+)\s*\}")
# A font around a formula, unlike one around words, a letter or a unit: \mathbf{\frac34}, \text{x^2}.
_FONT_OF_FORMULA = re.compile(
    rf"\\(?:(?P<bold>textbf|textit|mathbf|{_TEXT_FONTS}|{_MATH_FONTS})|{_KNOWN_FONTS})\s*(?=\{{)"
)
_MAX_FONTS = 20
_IS_FORMULA = re.compile(r"[\\=^<>+]")
_STARTS_FORMULA = re.compile(
    r"\s*-?\s*[\d.]*\s*\\(?:[dt]?frac|sqrt)(?![A-Za-z])|\s*-?[\d.]+\s*\\(?:pi|cdot|times)(?![A-Za-z])"
)
_TWO_PAIRS = re.compile(r"\{\{([^{}]*)\}\}")
_NOTHING = re.compile(r"\\(?:text|mbox|mathrm)\s*\{\s*(?:\}|\.\s*\}\s*$)")


def undressed(text: str) -> str:
    """The text without commands that change only its looks."""
    if _DRESSED.search(text) is None:
        return text
    bare = _ROW_SPACE.sub(lambda m: m[1] or (m[2] or "") * 2, text)
    bare = _COLOUR.sub("", bare)
    # Two blanks: "1\hspace{1cm}234" is not 1,234.
    bare = _NOTHING.sub(" ", _SPACE.sub("  ", bare))
    bare = _without_fonts(_TWO_PAIRS.sub(r"{\1}", _OLD_FONT.sub(_modern, bare)))
    bare = _NUMBER_IN_FONT.sub(_number, bare)
    bare = _PLAIN_LETTER.sub(r"\\mathbf", _PLAIN_TEXT.sub(r"\\text", bare))
    bare = _NAME_OF_FONT.sub("", bare)
    bare = _ACCENT_BARE.sub(lambda m: rf"\{m[1]}{{{m[2] or m[3] or m[4]}}}", _DOT_ABOVE.sub(r"\\dot{\1}", bare))
    bare = _POINTS.sub(r"\\angle \1", bare.replace(r"\overrightarrow{", r"\vec{"))
    bare = _BLACKBOARD.sub(lambda m: rf"\mathbb{{{m[3]}}}" if m[3] else _lettered(m[1], m[2]), bare)
    return without_braces(bare) if bare != text else text


def _without_fonts(text: str) -> str:
    """The text without the fonts of its formulas, whose braces stay where they are not around the whole text."""
    for font in reversed(list(_FONT_OF_FORMULA.finditer(text))[:_MAX_FONTS]):
        rest = text[font.end() :]
        end = _closing(rest)
        inner, is_whole = rest[1:end], font.start() == 0 and end == len(rest) - 1
        is_amount = font["bold"] is not None and any(map(str.isdigit, inner))
        if (_IS_FORMULA.search(inner) or is_amount) if is_whole else _STARTS_FORMULA.match(inner):
            text = text[: font.start()] + (inner if is_whole else rest)
    return text


def _number(match: re.Match[str]) -> str:
    # Beside ^, _ and a first argument the braces say where the number ends.
    return f"{match['before']}{{{match['number']}}}" if match["before"] else match["number"]


def _modern(match: re.Match[str]) -> str:
    command = r"\mathrm" if "rm" in (match["group"], match["name"]) else r"\mathbf"
    return command if match["name"] else f"{command}{{{match['content']}}}"


def _lettered(command: str, letter: str | None) -> str:
    command = "mathbb" if command == "Bbb" else command
    return rf"\{command}{{{letter}}}" if letter else rf"\{command}"


def without_braces(text: str, keep_lists: bool = False) -> str:
    """The text without braces around the whole of it; of many pairs, a few are taken away. With `keep_lists`, braces
    around a list stay, because {1,2} is a set; the comma of {(1,2)} belongs to the pair."""
    text = text.strip()
    for _ in range(_MAX_PAIRS):
        if not text.startswith("{") or _closing(text) != len(text) - 1:
            break
        if keep_lists and "," in text and "," in _outside_brackets(text[1:-1]):
            break
        text = text[1:-1].strip()
    return text


def _outside_brackets(text: str) -> str:
    depth, found = 0, []
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            found.append(character)
    return "".join(found)


def _closing(text: str) -> int:
    """The position of the brace that closes the first one; -1 without one."""
    depth = 0
    for mark in _STRUCTURE.finditer(text):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return mark.start()
    return -1


_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\s*\{(cases|aligned|gathered|align\*?|split)\}(.*)\\end\s*\{\1\}\s*\.?", re.DOTALL
)
_ENVIRONMENT = re.compile(
    r"\s*\\begin\s*\{(equation\*?|displaymath|math|align\*?|aligned|gather\*?|gathered|split|multline\*?|center)\}"
    r"((?:[^\\&]|\\(?![\\])(?!begin|end))*)(?:\\\\)?\s*\\end\s*\{\1\}\s*\.?"
    r"|\s*\\begin\s*\{array\}\s*\{c\}((?:[^\\&]|\\(?![\\])(?!begin|end))*)\\end\s*\{array\}"
)
_ALIGNED = re.compile(r"\s*&?\s*(=|<|>|\\(?:le|ge|ne|leq|geq|neq)(?![A-Za-z]))\s*&?\s*")


def without_system(text: str) -> str:
    r"""x=1, y=2 for \begin{cases}x=1\\y=2\end{cases}. A function given by cases has two columns, and stays as it is."""
    if r"\begin" not in text:
        return text
    if single := _ENVIRONMENT.fullmatch(text):
        return (single[2] or single[3] or "").strip()
    match = _SYSTEM.fullmatch(text)
    rows = [_ALIGNED.sub(r"\1 ", row).strip(" ,;") for row in match[2].split("\\\\")] if match else []
    rows = [row for row in rows if row]
    return (
        ", ".join(rows) if rows and all("&" not in row and re.search("[=<>]|\\\\[lgn]e", row) for row in rows) else text
    )


# ------------------------------------------------------------ numerals

_GROUP = re.compile(r"(?<=\d)(?:\{\s*\}|\\(?:text|mathord|mathpunct|mathrm|mbox)\s*(?=\{\s*,\s*\}))(?=[\d{])")
# A comma in braces never separates entries.
_BRACED_THOUSANDS = re.compile(r"(?<![\d.,}])\d{1,3}(?:\{\s*,\s*\}\d{3})+(?!\d)")
_THREE_DIGITS = re.compile(r"_\d{3}")
_UNDERSCORED = re.compile(r"(?<![\w.\\])\d{1,3}(?:\\?_\d{3})+(?![\w.])")
_REPEATING = re.compile(
    r"(?<![\d.])(?P<start>\d*\.\d*)\\(?:(?:overline|bar)\s*(?:\{\s*(?P<bar>\d{1,30})\s*\}|(?P<digit>\d))"
    r"|dot\s*\{(?P<first>\d)\}(?:\s*(?P<middle>\d{0,28})\s*\\dot\s*\{(?P<last>\d)\})?)"
)
_IN_PARENTHESES = re.compile(r"(?<![\w.)])(-?\d+\.|0?\.\d+)\((\d{1,30})\)(?![\w(^!])")
# C(5,2), ^5C_2 and 5C2; with P the ordered choices. But in x^2C_1 and 5C_1 the letter is a constant.
_CHOOSE = re.compile(
    r"(?<![A-Za-z\\])C\(\s*(?P<n>\d{1,5})\s*,\s*(?P<k>\d{1,5})\s*\)"
    r"|(?:\{\s*\}\s*|(?<![\w)}\]])(?<!\s))[\^_]\s*(?:\{\s*(?P<up>\d{1,5})\s*\}|(?P<one>\d))\s*(?P<kind>[CP])\s*"
    r"_\s*(?:\{\s*(?P<low>\d{1,5})\s*\}|(?P<digit>\d))"
    r"|(?<![\w.])(?P<side>\d{1,5})(?P<letter>[CP])(?P<beside>\d{1,5})(?![\w.])"
)
# (1,2) U (3,4)
_CAPITAL_U = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16", "binary": "2", "octal": "8", "hex": "16",
    "hexadecimal": "16",
}  # fmt: skip
# 0xA3 and 0b1010, as in programs.
_PREFIXED = re.compile(
    r"\s*0(?P<prefix>[xX](?=[0-9A-Fa-f]+\s*$)|[bB](?=[01]+\s*$)|[oO](?=[0-7]+\s*$))(?P<digits>\w+)\s*"
)
_PREFIXES = {"x": "16", "b": "2", "o": "8"}
_BINARY = re.compile(r"\bin\s+binary\b")
_BASE_BELOW = re.compile(
    r"_(?:(?<=[0-9A-Z)]_)|(?<=[0-9A-Z)] _))\s?(?:\{(?P<group>(?:[^{}]|\{[^{}]*\}){1,40})\}"
    r"|\\(?:text|mathrm)\s*\{(?P<text>[^{}]{1,20})\})"
)
_BASE_BESIDE = re.compile(
    r"\s*\(?(?P<digits>[0-9][0-9A-Za-z]*)\)?[\s,]*\(?\s*(?:in\s+)?base[\s-]*(?P<base>\w+)\s*\)?\s*"
)


def numerals(text: str) -> str:
    """The text with one spelling for thousands, repeating decimals and numerals with a base."""
    if "{}" in text or "{," in text or "{ " in text:
        text = _GROUP.sub("", text.removeprefix("{}").removesuffix("{}"))
        text = _BRACED_THOUSANDS.sub(lambda m: re.sub(r"[{},\s]", "", m[0]), text)
    if "." in text and "}" in text:
        text = _REPEATING.sub(_repeating, text)
    if "U" in text:
        text = _CAPITAL_U.sub(r"\\cup ", text)
    if "C" in text or "P" in text:
        text = _CHOOSE.sub(_chosen, text)
    if "_" in text:
        if _THREE_DIGITS.search(text):
            text = _UNDERSCORED.sub(lambda m: re.sub(r"[\\_]", "", m[0]), text)
        text = _BASE_BELOW.sub(_base, text)
    if "(" in text and "." in text:
        text = _IN_PARENTHESES.sub(r"\1\\overline{\2}", text)
    if prefixed := _PREFIXED.fullmatch(text):
        return f"{prefixed['digits']}_{{{_PREFIXES[prefixed['prefix'].casefold()]}}}"
    if "base" in text or "inary" in text:
        text = _BINARY.sub(r"base 2", text)
        flat = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*(?=\{)|[{}~]", " ", text)
        if (match := _BASE_BESIDE.fullmatch(" ".join(flat.replace("\\", " ").split()))) and (
            base := _named(match["base"])
        ):
            return f"{match['digits']}_{{{base}}}"
    return text


def _chosen(match: re.Match[str]) -> str:
    n = match["n"] or match["up"] or match["one"] or match["side"]
    k = match["k"] or match["low"] or match["digit"] or match["beside"]
    return rf"\binom{{{n}}}{{{k}}}" + (rf"\cdot {k}!" if "P" in (match["kind"], match["letter"]) else "")


def _repeating(match: re.Match[str]) -> str:
    digits = match["bar"] or match["digit"] or match["first"] + (match["middle"] or "") + (match["last"] or "")
    return rf"{match['start']}\overline{{{digits}}}"


def _base(match: re.Match[str]) -> str:
    words = re.sub(r"\\(?:text|mathrm|mbox|rm)(?![A-Za-z])|[{}()\[\]~\s,-]+|base", " ", match["group"] or match["text"])
    base = _named(words.strip())
    return f"_{{{base}}}" if base else match[0]


def _named(base: str) -> str | None:
    return _BASES.get(base.casefold(), base if base.isascii() and base.isdigit() else None)
