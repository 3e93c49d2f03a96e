"""Fixtures of the whole suite. Anything slow is made once a session."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# Nothing may be fetched at run time; set before any library reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ConfigFactory = Callable[..., Any]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in what a test wrote: pytest-xdist cannot send them from process to process."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="module", autouse=True)
def left_to_asyncio() -> Iterator[list[str]]:
    """A task that fails is awaited, or says that it may be given up (dphrl.background.one_of_many).

    For others the module's tests fail, because asyncio writes a traceback when Python collects the task: to a user's
    terminal, and here in the middle of another test, which fails if it is making a syntax tree (Python 3.11).
    """
    reports: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "never retrieved" in record.getMessage():
                reports.append(record.getMessage())

    listener = Listener()
    logging.getLogger("asyncio").addHandler(listener)
    yield reports
    gc.collect()
    logging.getLogger("asyncio").removeHandler(listener)
    assert reports == []


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real data sets, where this machine has them."""
    root = Path(os.environ.get("DPHRL_DATA", "../shared/data"))
    if not root.is_dir():
        pytest.skip("no DPHRL_DATA folder here")
    return root


@pytest.fixture(scope="session")
def tiny_dir() -> str:
    """The embedded model, warm-started once and cached: small, and with tied embeddings."""
    from dphrl.tiny import ensure_tiny_model

    return str(ensure_tiny_model())


@pytest.fixture(scope="session")
def tokenizer(tiny_dir: str) -> Any:
    from dphrl.tokenizer import load_tokenizer

    return load_tokenizer(tiny_dir)


@pytest.fixture(scope="session")
def make_config(tiny_dir: str) -> ConfigFactory:
    """A small configuration on the embedded task; keyword arguments are sections to change."""
    from dphrl.config.schema import Config

    def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        nested = {k: merge(base.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}
        return base | nested

    def make(**changes: Any) -> Config:
        small = {
            "model": {"path": tiny_dir, "dtype": "float32"},
            "data": {
                "train": {"name": "factor", "kind": "tiny", "limit": 24},
                "evaluation": [{"name": "factor", "kind": "tiny", "split": "held_out", "limit": 4}],
                "max_prompt_tokens": 16,
            },
            "reward": {"name": "factorization"},
            "algorithm": {"divergence": "forward_kl", "eta": 0.5, "num_minibatches": 2},
            "rollout": {"num_prompts": 4, "num_samples": 4, "max_tokens": 24, "kv_cache_gib": 1},
            "reference": {"num_samples": 4, "threshold": 1, "stored_per_prompt": 2, "rows_per_step": 4},
            "learner": {"num_steps": 2, "lr": 1e-3, "micro_batch_tokens": 512},
            "evaluation": {"num_samples": 4, "k": [1, 4]},
        }
        return Config.model_validate(merge(small, changes))

    return make


@pytest.fixture(scope="session")
def prompts(tokenizer: Any, make_config: ConfigFactory) -> list[Any]:
    from dphrl.data.chat import build_prompts
    from dphrl.data.loading import load_problems

    config = make_config()
    return build_prompts(load_problems(config.data.train, config.seed), tokenizer, config.data)[0]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray instance for tests that use actors directly; a whole run starts its own."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=2**29,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}},
    )
    yield
    ray.shutdown()
