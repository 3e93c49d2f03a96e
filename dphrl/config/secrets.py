"""What looks like a secret, by its name or its text.

A run's settings are written to config.yaml, reports and trackers, and what a job is given is shown to everybody who
sees the cluster's dashboard. So secrets reach a run by the environment of its nodes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dphrl.config.errors import Loc

_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PAT)(?:_|$)", re.IGNORECASE)
# Narrower: a reward may well have a parameter answer_key or stop_token.
_SETTING = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret)_?key|(?:api|access|auth|hf|bearer)_?token|secret|password|passwd|"
    r"passphrase|credentials?)$",
    re.IGNORECASE,
)
# scheme://user:password@host, scheme://token@host
_URI_WITH_CREDENTIALS = re.compile(r"://[^/\s@]+@")


def is_secret_variable(name: str, value: str) -> bool:
    """Whether a variable of the environment is a secret as far as this can be told."""
    return bool(_VARIABLE.search(name) or _URI_WITH_CREDENTIALS.search(value))


def secret_settings(tree: Any, loc: Loc = ()) -> Iterator[str]:
    """A line for each text in a tree of settings that looks like a secret. The text itself is in no line."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from secret_settings(value, (*loc, key))
    if isinstance(tree, str) and tree and loc and (_SETTING.search(str(loc[-1])) or _URI_WITH_CREDENTIALS.search(tree)):
        yield (
            f"{'.'.join(map(str, loc))}: looks like a secret, and settings are written to config.yaml and reports; "
            "let the code that needs it read a variable of the environment"
        )
