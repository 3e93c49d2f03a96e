"""The command that explains settings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cluster.cli.support import exit_status


def add_settings_command(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command(
        name="config",
        short_help="Explain settings.",
        help="""Explain a setting: what it means, what it may be, its default. Of a section: its settings, a line each.

Without KEY all sections are listed. With KEY=VALUE it is also said whether that value can be set.

--schema prints a JSON schema (draft 2020-12), from which editors complete and check a configuration file.

\b
Examples:
  dphrl config
  dphrl config learner
  dphrl config learner.lr=1e-5
  dphrl config --schema > dphrl.schema.json""",
    )(explain)


def explain(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A setting or section, such as learner or learner.lr.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a configuration file.")] = False,
) -> None:
    with exit_status() as run:
        if schema:
            if key is not None:
                raise run.refuse(f"--schema: is of the whole configuration; leave {key} out")
            from dphrl.config.editor import editor_schema

            typer.echo(json.dumps(editor_schema(), indent=2, ensure_ascii=False))
            return
        from dphrl.config.check import check_setting
        from dphrl.config.explain import explain_setting

        name, equals, _ = (key or "").partition("=")
        if name or not equals:
            typer.echo(explain_setting(name))
        if equals:
            typer.echo(f"\n{check_setting(key or '')}")
