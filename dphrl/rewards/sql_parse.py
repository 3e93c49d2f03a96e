"""Finds the SQL in a completion, and what matters in a query besides its rows: whether it orders them, its spelling."""

from __future__ import annotations

import re
from itertools import islice

import sqlglot
from sqlglot import exp

from dphrl.config.marks import THINKING_MARKS
from dphrl.rewards.thinking import Marks, spoken, tagged

# A block ends at a fence of the same sign that is as long at least. In four backquotes, three are content.
_FENCE = re.compile(r"`{3,}|~{3,}")
_SQL_LANGUAGES = frozenset(["sql", "sqlite", "sqlite3", "postgresql", "postgres", "mysql"])
_QUERY_WORDS = frozenset(["select", "values", "with"])
_LANGUAGE = re.compile(r"[ \t]*(?P<language>[\w+#.-]*)[ \t]*(?:\r?\n|\Z)|[ \t]*(?P<inline>sql(?:ite3?)?)\b", re.I)

# All patterns for blanks are possessive (without backtracking), because a model may write a million blanks.
_NAME = r"(?:\w++|\"[^\"\n]{1,200}\"|`[^`\n]{1,200}`|\[[^\]\n]{1,200}\])"
_QUERY = (
    rf"(?:select\b|values\s*+\(|with\s++(?:recursive\s++)?{_NAME}\s*+(?:\([^()]{{0,1000}}\)\s*+)?"
    r"as\b\s*+(?:(?:not\s++)?materialized\s*+)?\()"
)
# A line may also begin a query after a label ("SQL: SELECT ...", "Answer: SELECT ...") or after a backquote.
_QUERY_LINE = re.compile(rf"^[ \t>*]*+(?:[A-Za-z][\w ]{{0,30}}:[ \t*]*+)?`?(?P<sql>{_QUERY})", re.I | re.M)
# How models mark a query after prose: with tags that they are taught, or by "the answer is `SELECT ...`".
_TAG = re.compile(r"<(?i:/?(?:answer|sql|final[_ ]answer|solution))>")
_TAGGED = re.compile(rf"(?:(?:`{{3,}}|~{{3,}})[\w ]*\s)?\s*+[\"'`*]{{0,2}}{_QUERY}", re.I)
_ANSWER_QUOTE = re.compile(rf"\banswer(?:\s+is)?\s*+:?\s*+`(\s*+{_QUERY}[^`]{{0,20000}})`", re.I)
_ANY_QUOTE = re.compile(rf"`(\s*+{_QUERY}[^`]{{0,20000}})`", re.I)
# What a model puts around a whole query. No query begins with any of these.
_QUOTES = ("``", "`", "**", '"', "'", "\u201c\u201d")
_FIRST_WORD = re.compile(r"[A-Za-z]\w*")
_CLAUSES = (
    "select values with from where join left right inner outer full cross natural on using group order having limit "
    "offset window union intersect except and or not as when then else end in between like is null case exists "
    "alter analyze attach begin commit create delete detach drop explain insert pragma reindex release replace "
    "rollback savepoint update vacuum"
)
_CLAUSE_WORDS = frozenset(_CLAUSES.split())
# Prose is looked for at the end of so many paragraphs only, because each look reads the whole text.
_MAX_PARAGRAPHS = 20
_PARAGRAPH_END = re.compile(r"\n[ \t\r]*+\n")
# The word WITH also begins English sentences, so AS and a parenthesis must follow it, with any comments between. This
# long look ahead costs little, because a text has only one beginning.
_STATEMENT = re.compile(
    r"(?>\s|\ufeff|;|--[^\n]*\n|/\*.*?\*/)*+(?:select\b|values\s*+[(/-]|with\b(?=[^;]{1,2000}?\bas\b[^;]{0,100}?\()|"
    r"(?:alter|analyze|attach|begin|commit|create|delete|detach|drop|end|explain|insert|pragma|reindex|release|replace|"
    r"rollback|savepoint|truncate|update|vacuum)\b)",
    re.IGNORECASE | re.DOTALL,
)

_TOKEN = re.compile(
    r"'(?:[^']|'')*+'|\"(?:[^\"]|\"\")*+\"|`(?:[^`]|``)*+`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|[()]", re.DOTALL
)
# A longer query is compared by its text: the parser would take long, and recursion is limited.
_MAX_CANONICAL_CHARS = 5_000


def extract_sql(text: str, marks: Marks = THINKING_MARKS) -> str | None:
    """The SQL that a completion gives as its answer, in time linear in the text; "" if it gives none, None if its
    thinking never ends.

    It reads the completion's turn without its thoughts (`thinking.spoken`, with these `marks`). If <answer> or <sql>
    tags hold a query, only the last of them counts. With fences (three or more backquotes or tildes): the last block
    fenced as SQL, else the last fenced block without a language; a block that is not closed extends to the end. Without
    fences: the whole text when it starts with a statement, up to a blank line that only prose follows; else
    the query that "the answer is" quotes; else the last paragraph with a line that starts with SELECT, VALUES or
    WITH name AS, from the first such line on (a label such as "SQL:" may come before it); else the last query between
    backquotes; else the whole text. Quotes or emphasis around all of it are taken off.
    """
    said = spoken(text, marks)
    return None if said is None else _unquoted(_answer(said))


def _answer(text: str) -> str:
    text = next((content for _, content in tagged(text, _TAG) if _TAGGED.match(content)), text)
    if _FENCE.search(text):
        return _last_block(text)
    text = _unquoted(text)
    # This comes before the searches that cut the text: a bare statement keeps what follows it and is judged as a whole.
    if _STATEMENT.match(text):
        return _without_remarks(text).strip()
    if answers := _ANSWER_QUOTE.findall(text):
        return str(answers[-1]).strip()
    for paragraph in reversed(_PARAGRAPH_END.split(text)):
        if found := _QUERY_LINE.search(paragraph):
            sql = paragraph[found.start("sql") :].strip()
            quoted = paragraph[: found.start("sql")].endswith("`")
            return sql.partition("`")[0] if quoted else sql
    if quotes := _ANY_QUOTE.findall(text):
        return str(quotes[-1]).strip()
    return text.strip()


def _unquoted(text: str) -> str:
    """A query without the quotes around all of it; any other text as it is."""
    quoted = text.strip().removesuffix(".").removesuffix(";")
    for quote in _QUOTES:
        opening, closing = (quote[0], quote[1]) if quote == _QUOTES[-1] else (quote, quote)
        if quoted.startswith(opening) and quoted.endswith(closing):
            inside = quoted[len(opening) : -len(closing)]
            return inside.strip() if _STATEMENT.match(inside) else text
    return text


def _without_remarks(text: str) -> str:
    """A bare statement without the prose after a blank line. Text that could belong to the statement or be another one
    stays: a quote or parenthesis is open before the blank line, or an SQL word or a semicolon comes after it."""
    for end in islice(_PARAGRAPH_END.finditer(text), _MAX_PARAGRAPHS):
        head, rest = text[: end.start()], text[end.end() :]
        word = _FIRST_WORD.match(rest)
        pairs = (("(", ")"), ("/*", "*/"))
        closed = all(head.count(quote) % 2 == 0 for quote in "'\"`") and all(
            head.count(opening) == head.count(closing) for opening, closing in pairs
        )
        if closed and word and word[0].lower() not in _CLAUSE_WORDS and ";" not in rest:
            return head
    return text


def _last_block(text: str, *, outermost: bool = True) -> str:
    plain = ""
    for block in reversed(_blocks(text)):
        found = _LANGUAGE.match(block)
        language = (found["language"] or found["inline"] or "").lower() if found else ""
        if not found or language in _QUERY_WORDS:
            language, start = "", 0
        else:
            start = found.end()
        # An outer block, of Markdown say, may hold the query's own.
        inner = _last_block(block, outermost=False) if outermost and _FENCE.search(block) else ""
        if inner or language in _SQL_LANGUAGES:
            return inner or block[start:].strip()
        if not language and not plain:
            plain = block[start:].strip()
    return plain


def _blocks(text: str) -> list[str]:
    """What stands between fences, the language included. A block that is not closed extends to the end."""
    blocks: list[str] = []
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif fence[0].startswith(opened[0]):
            blocks.append(text[opened.end() : fence.start()])
            opened = None
    return blocks if opened is None else [*blocks, text[opened.end() :]]


def orders_rows(sql: str) -> bool:
    """Whether a query orders its result: it has ORDER BY outside all parentheses, also at the end of a set operation.

    Inside parentheses, ORDER BY belongs to a subquery, a window or an aggregate and does not order the result.
    """
    depth, previous = 0, ""
    for token in _TOKEN.findall(sql):
        if token.startswith(("--", "/*")):
            continue
        if token == "(":
            depth += 1
        elif token == ")":
            depth -= 1
        elif depth == 0 and previous == "order" and token.lower() == "by":
            return True
        previous = token.lower()
    return False


def canonical_sql(sql: str, columns: frozenset[str]) -> str:
    """One spelling for queries that differ only in layout, letter case of names, aliases and ways of quoting; distinct
    solutions are counted by it. Literals are kept.

    columns: lower-case names of the columns that the query reads; SQLite takes a double-quoted word that is none of
    them for a string literal. A text that is long or cannot be parsed is returned with its blanks collapsed.
    """
    collapsed = " ".join(sql.split()).rstrip("; ")
    if len(sql) > _MAX_CANONICAL_CHARS:
        return collapsed
    try:
        trees = [tree for tree in sqlglot.parse(sql, dialect="sqlite") if tree]
        if len(trees) != 1:
            return collapsed
        _normalize(trees[0], columns)
        return str(trees[0].sql(dialect="sqlite", comments=False, copy=False))
    except (sqlglot.errors.SqlglotError, RecursionError):
        return collapsed


def _normalize(tree: exp.Expression, columns: frozenset[str]) -> None:
    nodes = _without_unused_aliases(tree)
    tables: dict[str, str] = {}
    outputs: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, exp.TableAlias):
            tables.setdefault(node.name.lower(), f"t{len(tables) + 1}")
        elif isinstance(node, exp.Alias):
            outputs.setdefault(node.alias.lower(), f"c{len(outputs) + 1}")
    common_tables = {node.alias.lower() for node in nodes if isinstance(node, exp.CTE)}
    for name in nodes:
        if not isinstance(name, exp.Identifier):
            continue
        key, parent, role = name.name.lower(), name.parent, name.arg_key
        if isinstance(parent, exp.Column) and role == "this" and not parent.args.get("table"):
            if name.args.get("quoted") and key not in columns and key not in outputs:
                parent.replace(exp.Literal.string(name.name))
                continue
            new = key if key in columns else outputs.get(key, key)
        elif (isinstance(parent, exp.TableAlias) and role == "this") or role == "table":
            new = tables.get(key, key)
        elif isinstance(parent, exp.Table) and role == "this":
            new = tables.get(key, key) if key in common_tables else key
        elif isinstance(parent, exp.Alias):
            new = outputs.get(key, key)
        else:
            new = key
        name.set("this", new)
        name.set("quoted", not new.isidentifier())


def _without_unused_aliases(tree: exp.Expression) -> list[exp.Expression]:
    """All nodes in the order of the text, after each output alias that nothing refers to is replaced by its value."""
    nodes = list(tree.walk(bfs=False))
    used = {node.name.lower() for node in nodes if isinstance(node, exp.Column)}
    dropped = set()
    for node in nodes:
        if isinstance(node, exp.Alias) and node.alias.lower() not in used:
            node.replace(node.this)
            dropped |= {id(node), id(node.args["alias"])}
    return [node for node in nodes if id(node) not in dropped]
