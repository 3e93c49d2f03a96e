"""What a query may do, and what SQLite's refusals mean.

SQLite's own parser decides, through its authorizer. So there is no second grammar that could read a statement
differently from the parser that runs it.
"""

from __future__ import annotations

import re

import apsw

from dphrl.types import RewardStatus

_AGGREGATES = """
    avg count group_concat max median min percentile percentile_cont percentile_disc string_agg sum total
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
    json_group_array json_group_object jsonb_group_array jsonb_group_object
"""
_TEXT_AND_NUMBERS = """
    abs char coalesce concat concat_ws format glob hex if ifnull iif instr length like likelihood likely lower ltrim
    nullif octet_length printf quote replace round rtrim sign soundex substr substring trim typeof unhex unicode
    unistr unistr_quote unlikely upper
    acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power
    radians sin sinh sqrt tan tanh trunc
"""
# The clock that "now" reads stands still, see dphrl.sandbox.sqlite_file.
_TIME = "current_date current_time current_timestamp date datetime julianday strftime time timediff unixepoch"
_JSON = """
    -> ->> json json_array json_array_insert json_array_length json_error_position json_extract json_insert
    json_object json_patch json_pretty json_quote json_remove json_replace json_set json_type json_valid
    jsonb jsonb_array jsonb_array_insert jsonb_extract jsonb_insert jsonb_object jsonb_patch jsonb_remove
    jsonb_replace jsonb_set
"""
# Functions are left out if their value differs from call to call (random, randomblob), or is about the process and not
# the data (changes, sqlite_version), if they reach outside (load_extension), or only make something large (zeroblob).
ALLOWED_FUNCTIONS = frozenset(f"{_AGGREGATES} {_TEXT_AND_NUMBERS} {_TIME} {_JSON}".split())

# Tables that SQLite makes up, and tables about the database instead of in it. The exception is sqlite_sequence, which
# holds the counters of AUTOINCREMENT: they are rows like any others, and data sets list this table in their schemas.
_INTERNAL_PREFIXES = ("sqlite_", "pragma_", "fts5", "rtree", "geopoly")
_MADE_UP = """
    bytecode carray completion csv dbstat fsdir fts3tokenize generate_series json_each json_tree jsonb_each jsonb_tree
    tables_used wholenumber zipfile
"""
_INTERNAL_TABLES = frozenset(_MADE_UP.split())
_ORDINARY_DESPITE_PREFIX = "sqlite_sequence"

# A pattern must match the whole message, because a message may quote the query, and the query could otherwise choose
# its own status.
_STATUS_OF_MESSAGE = (
    (
        re.compile(r'near ".*": syntax error|unrecognized token: .*|incomplete input', re.DOTALL),
        RewardStatus.UNPARSABLE,
    ),
    (re.compile(r"(?:ORDER BY|LIMIT) clause should come after \w+(?: \w+)? not before"), RewardStatus.UNPARSABLE),
    (re.compile(r"no such (?:function|module): .*|'.*' is not a function", re.DOTALL), RewardStatus.REFUSED),
    (
        re.compile(r"unsafe use of .*|variable number must be .*|too many SQL variables", re.DOTALL),
        RewardStatus.REFUSED,
    ),
    (re.compile(r"(?:too many|at most \d+ tables|Expression tree is too large) .*"), RewardStatus.RESOURCE_LIMIT),
    (re.compile(r"Recursion limit|parser stack overflow|.* too (?:complex|deep)"), RewardStatus.RESOURCE_LIMIT),
)
_UNKNOWN_TABLE = re.compile(r"no such table: (?:\w+\.)?(?P<name>.+)", re.DOTALL)


def is_internal(table: str) -> bool:
    """Whether a table's name, in lower case, belongs to SQLite rather than to the database's author."""
    if table == _ORDINARY_DESPITE_PREFIX:
        return False
    return table in _INTERNAL_TABLES or table.startswith(_INTERNAL_PREFIXES)


class Guard:
    """An authorizer: reading the named tables and calling the allowed functions passes, everything else is denied.

    tables: lower-case names of the ordinary tables and views. `denied` says what was denied first, "" if nothing was;
    `columns` holds the lower-case names of the columns read.
    """

    def __init__(self, tables: frozenset[str]) -> None:
        self._tables = tables
        self.denied = ""
        self.columns: set[str] = set()

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == apsw.SQLITE_READ:
            return self._read((first or "").lower(), (second or "").lower())
        if action == apsw.SQLITE_FUNCTION:
            permitted, what = (second or "").lower() in ALLOWED_FUNCTIONS, f"function {second}"
        else:
            permitted = action in (apsw.SQLITE_SELECT, apsw.SQLITE_RECURSIVE)
            what = str(apsw.mapping_authorizer_function.get(action, action)).removeprefix("SQLITE_").replace("_", " ")
        return apsw.SQLITE_OK if permitted else self._deny(what)

    def _read(self, table: str, column: str) -> int:
        # Without a column the name may be that of a common table expression, which is in no schema.
        if table in self._tables or (not column and not is_internal(table)):
            self.columns.add(column)
            return apsw.SQLITE_OK
        return self._deny(f"table {table}")

    def _deny(self, what: str) -> int:
        self.denied = self.denied or what
        return apsw.SQLITE_DENY


def status_of_sql_error(message: str, sql: str) -> RewardStatus:
    """What SQLITE_ERROR with this message says about the query: not SQL, not permitted, too large, or just wrong."""
    if unknown := _UNKNOWN_TABLE.match(message):
        name = unknown["name"]
        # A table-valued function that this SQLite lacks is reported as a missing table.
        called = re.search(re.escape(name) + r"""["'`\]]?\s*\(""", sql, re.IGNORECASE)
        return RewardStatus.REFUSED if called or is_internal(name.lower()) else RewardStatus.WRONG
    for pattern, status in _STATUS_OF_MESSAGE:
        if pattern.fullmatch(message):
            return status
    return RewardStatus.WRONG
