"""Two small SQLite databases with the flaws of real ones, made from nothing.

`league` (players, their awards and goals by year) is what RL trains on; `company` (employees, their bonuses and
sales) has other tables and columns for the same kinds of questions. Because of their rows, a query that is written from
the question alone is right for one group and wrong for another: there are namesakes, events that belong to a whole
group and name nobody (NULL), people without any event, and people with several events in one year.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ADJECTIVES = (
    "Amber Blue Bold Bright Calm Clear Cold Deep Dry Early Gentle Golden "
    "Grand Green High Late Long Mild New Old Quiet Red Silver Warm"
)
_NOUNS = (
    "Bay Bridge Brook Canyon Cliff Coast Creek Dale Field Forest Gate Glen "
    "Harbour Hill Island Lake Meadow Mill Park Ridge River Shore Valley Wood"
)
_NAMES = (
    "Ada Ali Ana Ben Bo Carl Cleo Dan Dee Eli Eva Finn Gus Hana Ida Ines Ivo Jan Joy Kai Kim Lea Leo Lin Max Mia "
    "Nia Noa Ola Pia Ravi Ray Rosa Sam Sol Tara Ted Uma Vera Yan"
)
# A group is called "Blue River": two words to copy, and more names than a small policy can learn by heart.
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
GROUP_NAMES: tuple[str, ...] = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
YEARS: tuple[int, ...] = (2019, 2020, 2021, 2022, 2023)

# Part of the directory's name in the cache: raise it with any change of this file that changes a row.
CONTENT_VERSION = 1

# Chosen so that every combination of right and wrong query shapes occurs in each kind of question often enough.
_GROUP_SIZES = (5, 6, 7)
_NAMESAKES_PROBABILITY = 0.55
_IDLE_PROBABILITY = 0.5
_UNATTRIBUTED_PROBABILITY = 0.5
_EVENTS_IN_A_YEAR_WEIGHTS = (0.5, 0.38, 0.12)


@dataclass(frozen=True)
class EventTable:
    """A table of dated events (key, group, year), and the two ways to ask for them: "won no award"."""

    table: str
    none_of_it: str
    one_of_it: str


@dataclass(frozen=True)
class Schema:
    """People in named groups, and what they did in which year.

    The people table is (key, name, group); an event whose key is NULL belongs to the group as a whole.
    """

    database: str
    people: str
    key: str
    name: str
    group: str
    asked_as: str
    events: tuple[EventTable, EventTable]


SCHEMAS: dict[str, Schema] = {
    "league": Schema(
        "league",
        people="player",
        key="player_id",
        name="name",
        group="team",
        asked_as="players",
        events=(
            EventTable("award", "won no award", "won an award"),
            EventTable("goal", "scored no goal", "scored a goal"),
        ),
    ),
    "company": Schema(
        "company",
        people="employee",
        key="employee_id",
        name="full_name",
        group="office",
        asked_as="employees",
        events=(
            EventTable("bonus", "got no bonus", "got a bonus"),
            EventTable("sale", "made no sale", "made a sale"),
        ),
    ),
}


def build_database(schema: Schema, connection: sqlite3.Connection) -> None:
    """Create and fill the tables of `schema`; the rows and their order are the same on every machine."""
    people, key, group = schema.people, schema.key, schema.group
    connection.execute(
        f"CREATE TABLE {people} ({key} INTEGER PRIMARY KEY, {schema.name} TEXT NOT NULL, {group} TEXT NOT NULL)"
    )
    connection.execute(f"CREATE INDEX {people}_{group} ON {people} ({group})")
    for event in schema.events:
        connection.execute(
            f"CREATE TABLE {event.table} "
            f"({key} INTEGER REFERENCES {people} ({key}), {group} TEXT NOT NULL, year INTEGER NOT NULL)"
        )
        connection.execute(f"CREATE INDEX {event.table}_{key} ON {event.table} ({key})")
        connection.execute(f"CREATE INDEX {event.table}_{group} ON {event.table} ({group})")
    next_key = 1
    for group_name in GROUP_NAMES:
        rng = random.Random(f"{schema.database}:{group_name}")
        names = _draw_names(rng)
        keys = list(range(next_key, next_key + len(names)))
        next_key += len(names)
        rows = [(number, name, group_name) for number, name in zip(keys, names, strict=True)]
        connection.executemany(f"INSERT INTO {people} VALUES (?, ?, ?)", rows)
        for event in schema.events:
            events = [(number, group_name, year) for number, year in _draw_events(rng, keys)]
            connection.executemany(f"INSERT INTO {event.table} VALUES (?, ?, ?)", events)
    connection.commit()


def _draw_names(rng: random.Random) -> list[str]:
    num_people = rng.choice(_GROUP_SIZES)
    if rng.random() < _NAMESAKES_PROBABILITY:
        return rng.choices(rng.sample(_NAMES.split(), 3), k=num_people)
    return rng.sample(_NAMES.split(), num_people)


def _draw_events(rng: random.Random, keys: list[int]) -> Iterator[tuple[int | None, int]]:
    """(key or None, year) of each event of one group."""
    idle = rng.choice(keys) if rng.random() < _IDLE_PROBABILITY else None
    for number in keys:
        years: list[int] = []
        # Only the idle person has no event at all. Otherwise the chance of such a person would depend on the group's
        # size.
        while number != idle and not years:
            for year in YEARS:
                (num_events,) = rng.choices((0, 1, 2), _EVENTS_IN_A_YEAR_WEIGHTS)
                years += [year] * num_events
        yield from ((number, year) for year in years)
    for year in YEARS:
        if rng.random() < _UNATTRIBUTED_PROBABILITY:
            yield None, year


def ensure_databases(cache_dir: Path | None = None) -> dict[str, Path]:
    """The SQLite files by database name ("league", "company"), built now if they are not cached yet.

    cache_dir: where to keep them; else $DPHRL_CACHE, else ~/.cache/dphrl. The files are read-only, about 1 MB each
    and take under a second to build. Several processes may call this at once: each builds its own files and moves them
    into place, and nobody ever sees half a database. Raises OSError when the cache cannot be written.
    """
    root = cache_dir or Path(os.environ.get("DPHRL_CACHE") or Path.home() / ".cache" / "dphrl")
    target = root.expanduser() / f"tiny-sql-databases-{CONTENT_VERSION}"
    files = {name: target / f"{name}.sqlite" for name in SCHEMAS}
    target.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        if path.is_file():
            continue
        # It lies beside the target, because os.replace is atomic only within one file system.
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target))
        try:
            connection = sqlite3.connect(scratch / path.name)
            try:
                build_database(SCHEMAS[name], connection)
            finally:
                connection.close()
            (scratch / path.name).chmod(0o444)
            os.replace(scratch / path.name, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return files
