"""The pages of the documentation, taken apart: fenced blocks, commands, links, headings.

Comments above a block say what the tests need to know of it, and GitHub shows neither:

    <!-- needs: cluster, data -->   its commands are not run here, because they need that
    <!-- file: NAME -->             it is the file NAME for the commands of its page
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"```(?P<language>[a-z]*)\s*$")
_COMMENT = re.compile(r"<!-- (?P<key>needs|file): (?P<value>[^>]+?) -->$")
_INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"#{1,6} (.+)$")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its opening fence, from 1."""

    page: Path
    line: int
    language: str
    text: str
    needs: frozenset[str] = frozenset()
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Its command lines as words, comments left out; only of a block of shell."""
        assert self.language == "sh", self.place
        lines = [shlex.split(line, comments=True) for line in self.text.splitlines()]
        return [words for words in lines if words]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for a fence that never closes."""
    found: list[Block] = []
    notes: dict[str, str] = {}
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is not None:
            start, language, body = opened
            if line == "```":
                needs = frozenset(part.strip() for part in notes.get("needs", "").split(",") if part.strip())
                text = "".join(f"{entry}\n" for entry in body)
                found.append(Block(page, start, language, text, needs, notes.get("file", "")))
                opened, notes = None, {}
            else:
                body.append(line)
        elif fence := _FENCE.match(line):
            opened = (number, fence["language"], [])
        elif comment := _COMMENT.match(line):
            notes[comment["key"]] = comment["value"]
        elif line.strip():
            notes = {}
    if opened is not None:
        raise ValueError(f"{page}:{opened[0]}: this block never ends")
    return found


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    lines: list[str] = []
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return "\n".join(lines)


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks in the page's prose."""
    return _INLINE_CODE.findall(prose_of(page))


def links_of(page: Path) -> list[str]:
    """Targets of the page's links and pictures."""
    return _LINK.findall(re.sub(_INLINE_CODE, "", prose_of(page)))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    anchors: set[str] = set()
    for line in prose_of(page).splitlines():
        if heading := _HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").strip().lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            number = sum(
                slug == known or re.fullmatch(rf"{re.escape(slug)}-\d+", known) is not None for known in anchors
            )
            anchors.add(f"{slug}-{number}" if number else slug)
    return anchors


def command_blocks() -> Iterator[Block]:
    """The blocks of shell of all pages."""
    for page in PAGES:
        yield from (block for block in blocks_of(page) if block.language == "sh")


def files_of(page: Path) -> dict[str, str]:
    """The files that a page's blocks give to its commands."""
    return {block.file: block.text for block in blocks_of(page) if block.file}
