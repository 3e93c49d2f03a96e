"""What `dphrl presets --algorithms` lists: every registered method, how it is written, and what it does."""

from __future__ import annotations

from collections.abc import Sequence

from dphrl.algo.registry import METHODS
from dphrl.config.algorithm import import_plugins
from dphrl.config.loading import InputError


def list_methods(plugins: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """The methods by their place in the configuration, those of `plugins` included. Raises InputError for a bad one."""
    try:
        import_plugins(plugins)
    except ValueError as error:
        raise InputError(f"--plugin: {error}") from None
    found = {}
    for key, registry in METHODS.items():
        rows = [(name, "", meaning) for name, meaning in registry.reserved.items()]
        rows += [(m.name, m.takes if m.parameters else "", m.summary) for m in registry.methods().values()]
        found[f"algorithm.{key}"] = [dict(zip(("name", "parameters", "summary"), row, strict=True)) for row in rows]
    return found


def method_table(found: dict[str, list[dict[str, str]]]) -> str:
    """A paragraph for each place; the names of all in one column, then their parameters and what they do."""
    width = max(len(row["name"]) for rows in found.values() for row in rows)
    paragraphs = []
    for place, rows in found.items():
        lines = [f"{place}: NAME, or {{name: NAME, PARAMETER: VALUE}}"]
        for row in rows:
            lines.append(f"  {row['name']:<{width}}  {row['summary']}".rstrip())
            if row["parameters"]:
                lines.append(f"  {'':<{width}}  takes {row['parameters']}")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)
