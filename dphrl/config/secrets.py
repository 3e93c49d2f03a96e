"""What looks like a secret, by its name or its text.

A run's settings are written to config.yaml, reports and trackers, and what a job is given is shown to everybody who
sees the cluster's dashboard. So secrets reach a run by the environment of its nodes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dphrl.config.errors import Loc

_VARIABLE = re.compile(
    r"(?:^|_)(?:(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)(?:_|$)|PAT$)", re.IGNORECASE
)
# SSL_KEY_FILE says where a secret is.
_VARIABLE_OF_PLACE = re.compile(r"_(?:FILE|PATH|DIR|NAME)$", re.IGNORECASE)
# Narrower: a reward may well have a parameter answer_key or stop_token.
_SETTING = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret)_?key|(?:api|access|auth|hf|bearer)_?token|secret|password|passwd|"
    r"passphrase|credentials?)$",
    re.IGNORECASE,
)
# scheme://user:password@host, https://TOKEN@host. What other schemes have before the @ is a name: ssh://git@host,
# abfss://container@account.
_URI_WITH_CREDENTIALS = re.compile(r"://[^/\s@:]*:[^/\s@]+@|https?://[^/\s@:]{16,}@", re.IGNORECASE)
# Tokens that say of what they are one: of Hugging Face, GitHub, GitLab, OpenAI and those that imitate it, Slack, AWS.
_KNOWN_TOKEN = re.compile(
    r"(?=.*[0-9])(?:(?:hf_|gh[oprsu]_|AKIA|ASIA)[A-Za-z0-9]{16,}|(?:github_pat_|glpat-|sk-|xox[abeprs]-)[\w-]{20,})"
)
# What is written where no secret is needed. A local server of models takes any key, and EMPTY is the usual one.
_NO_SECRET = re.compile(r"|empty|none|null|nil|no|false|true|unused|dummy|n/?a|x+|\*+|-+", re.IGNORECASE)
# /run/key, ./key, ~/key, key.json. A secret in base64 may have a / further on.
_PATH = re.compile(r"(?:/|~|\.\.?/)\S*|\S+\.(?:json|ya?ml|toml|ini|cfg|txt|pem|key|crt|env|csv)", re.IGNORECASE)
# The name of a column, or of a part of the user's code.
_IDENTIFIER = re.compile(r"[a-z]+(?:[_.][a-z]+)*")
_MIN_CHARACTERS = 8


def names_a_secret(name: str) -> bool:
    """Whether a variable of the environment has the name of a secret, such as HF_TOKEN."""
    return bool(_VARIABLE.search(name) and not _VARIABLE_OF_PLACE.search(name))


def is_secret_variable(name: str, value: str) -> bool:
    """Whether a variable of the environment is a secret as far as this can be told."""
    by_name = names_a_secret(name) and not _is_harmless(value)
    return bool(by_name or _KNOWN_TOKEN.fullmatch(value.strip()) or _URI_WITH_CREDENTIALS.search(value))


def secret_settings(tree: Any, loc: Loc = ()) -> Iterator[str]:
    """A line for each text in a tree of settings that looks like a secret. The text itself is in no line."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from secret_settings(value, (*loc, key))
    if isinstance(tree, str) and loc and _is_secret_setting(str(loc[-1]), tree):
        yield (
            f"{'.'.join(map(str, loc))}: looks like a secret, and settings are written to config.yaml and reports; "
            "let the code that needs it read a variable of the environment"
        )


def _is_secret_setting(key: str, text: str) -> bool:
    # Unlike variables, settings of such names are often names or words themselves.
    is_word = len(text) < _MIN_CHARACTERS or bool(re.search(r"\s", text) or _IDENTIFIER.fullmatch(text))
    by_key = _SETTING.search(key) and not is_word and not _is_harmless(text)
    return bool(by_key or _URI_WITH_CREDENTIALS.search(text))


def _is_harmless(text: str) -> bool:
    return bool(_NO_SECRET.fullmatch(text) or _PATH.fullmatch(text))
