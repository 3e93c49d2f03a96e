"""What looks like a secret among settings, and what only resembles one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dphrl.config.loading import ConfigError, dump_config, load_config
from dphrl.config.secrets import is_secret_variable, secret_settings

# No key of anything: as long and as mixed as keys are.
KEY = "sk-" + "Ab3" * 8


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("api_key", KEY),
        ("secret_key", "wJalr/" + "K7MDENG/" + "Cy3Q" * 4),
        ("hf_token", "hf_" + "aB1" * 9),
        ("password", "hunter2-and-3"),
        ("password", "Sesame12"),
        ("path", "postgres://me:sesame@host/db"),
        ("path", "s3://key:sesame@bucket"),
        ("path", f"https://{'aB1' * 9}@host/x"),
        ("system_prompt", "Ask https://me:sesame@host/x for help."),
    ],
)
def test_a_secret_is_refused(key: str, text: str) -> None:
    (line,) = secret_settings({"reward": {"params": {key: text}}})
    assert line.startswith(f"reward.params.{key}: looks like a secret")
    assert text not in line


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("api_key", text) for text in ("EMPTY", "none", "null", "", "dummy", "unused")),
        *(("credentials", text) for text in ("path/to.json", "/run/secrets/Key1", "~/Key-of-2", "./Key-of-2")),
        ("access_key", "column_name"),
        ("private_key", "package.module_of_mine"),
        ("secret", "what nobody knows"),
        ("answer_key", KEY),
        ("path", "abfss://container-of-many-letters@account.dfs.core.windows.net/x"),
        ("path", "ssh://git@host/x"),
        ("path", "https://me@host/x"),
        ("path", "hf://datasets/a/b@c"),
        ("system_prompt", "Clone ssh://git@host/x, then answer."),
    ],
)
def test_what_resembles_one_is_not(key: str, text: str) -> None:
    assert list(secret_settings({"reward": {"params": {key: text}}})) == []


TOKENS = [
    "hf_" + "aB1" * 9,
    "ghp_" + "aB1" * 12,
    "github_pat_" + "a_1" * 9,
    "glpat-" + "a-1" * 7,
    KEY,
    "AKIA" + "AB12" * 4,
]


@pytest.mark.parametrize("value", TOKENS)
def test_a_token_is_one_whatever_its_variable_is_called(value: str) -> None:
    assert is_secret_variable("ROUTER", value)
    assert is_secret_variable("ROUTER", f" {value}\n")
    assert not is_secret_variable("ROUTER", f"/models/{value}")


@pytest.mark.parametrize(
    "value", ["hf_transfer", "hf_internal_testing_model_2", "sk-learn", "ghp_1", "AKIA", "0123" * 10]
)
def test_a_word_that_begins_like_a_token_is_none(value: str) -> None:
    assert not is_secret_variable("ROUTER", value)


def test_what_a_run_has_stored_can_be_read(make_config: Any, tmp_path: Path) -> None:
    config = make_config(reward={"name": "a:b", "params": {"api_key": KEY}})
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml"), stored=True) == config
    with pytest.raises(ConfigError, match=r"reward\.params\.api_key: looks like a secret"):
        load_config(str(tmp_path / "config.yaml"))
