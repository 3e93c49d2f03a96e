"""May the token read the model: asked of a stand-in for the hub, on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

import dphrl.hub
from cluster.cli import app
from cluster.doctor.hub import examine_model
from dphrl.config.loading import InputError, load_config
from dphrl.hub import access_obstacle
from dphrl.prepare import prepare
from dphrl.tracking.console import Console

GOOD, OTHER = "hf_" + "aB1" * 9, "hf_" + "cD2" * 9


class Hub:
    """Models `free/model`, for everybody; `gated/model`, for GOOD alone; `private/model`, whose existence it tells
    GOOD alone. asked: the paths."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_mirror = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, code, message = hub.answer(self.path, token)
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                if message:
                    self.send_header("X-Error-Message", message)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, path: str, token: str) -> tuple[int, str, str]:
        if self.is_mirror:
            return 404, "", ""
        if token not in ("", GOOD, OTHER):
            return 401, "", "Invalid credentials in Authorization header"
        name = path.removeprefix("/api/models/").removesuffix("/auth-check")
        if name == "free/model" or token == GOOD:
            return 200, "", ""
        if name == "gated/model":
            return 403 if token else 401, "GatedRepo", "Access is restricted."
        return 404 if token else 401, "RepoNotFound", "Repository not found"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(dphrl.hub, "is_cached", lambda model: False)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("model", "token", "words"),
    [
        ("free/model", None, None),
        ("free/model", OTHER, None),
        ("gated/model", GOOD, None),
        ("private/model", GOOD, None),
        ("gated/model", None, ["gated/model is gated, and no token is here; accept its terms at ", "HF_TOKEN"]),
        ("gated/model", OTHER, ["gated/model is gated, and the token that is here may not read it", "HF_TOKEN"]),
        ("private/model", None, ["private/model cannot be read at ", "without a token, and none is here", "HF_TOKEN"]),
        (
            "private/model",
            OTHER,
            ["private/model cannot be read at ", "with the token that is here", "correct the name"],
        ),
        (
            "free/model",
            "hf_" + "revoked0" * 3,
            ["refuses the token that is here (401)", "put a valid one into HF_TOKEN"],
        ),
    ],
)
def test_what_the_hub_says_of_the_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, model: str, token: str | None, words: list[str] | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = access_obstacle(model)
    assert hub.asked == [f"/api/models/{model}/auth-check"]
    if words is None:
        assert said is None
        return
    assert said is not None
    assert said.startswith("model.path: ")
    assert "\n" not in said
    assert "; " in said
    for word in words:
        assert word in said
    assert not (token and token in said)


def test_nobody_is_asked_offline_or_for_what_is_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dphrl.hub, "is_cached", lambda model: True)
    assert access_obstacle("gated/model") is None
    monkeypatch.setattr(dphrl.hub, "is_cached", lambda model: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert access_obstacle("gated/model") is None
    assert hub.asked == []


def test_a_mirror_that_does_not_know_the_question_is_no_obstacle(hub: Hub) -> None:
    hub.is_mirror = True
    assert access_obstacle("free/model") is None
    assert len(hub.asked) == 1


def test_a_hub_that_does_not_answer_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    said = access_obstacle("free/model")
    assert said is not None
    assert said.startswith(f"model.path: free/model is not on this machine, and {hub.url} does not answer (")
    assert "HF_HUB_OFFLINE=1" in said


def test_a_hub_that_is_silent_is_left_after_a_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()

    def answer_late(path: str, token: str) -> tuple[int, str, str]:
        silent.wait(5)
        return 200, "", ""

    monkeypatch.setattr(hub, "answer", answer_late)
    monkeypatch.setattr(dphrl.hub, "TIMEOUT_S", 0.2)
    said = access_obstacle("free/model")
    silent.set()
    assert said is not None
    assert "does not answer (" in said


def test_a_run_is_refused_before_anything_is_loaded(hub: Hub, tmp_path: Path) -> None:
    config = load_config("demo-math", ["model.path=gated/model", f"run_dir={tmp_path}"])
    with pytest.raises(InputError, match=r"^model\.path: gated/model is gated, and no token is here; .*HF_TOKEN"):
        prepare(config, Console())
    assert hub.asked == ["/api/models/gated/model/auth-check"]


def test_a_whole_copy_in_the_cache_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(dphrl.hub, "model_folder", lambda model: folder)
    assert not dphrl.hub.is_cached("org/model")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert dphrl.hub.is_cached("org/model")


# ------------------------------------------------------------------------------------------ the doctor
def test_the_doctor_asks_for_a_model(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gated = examine_model("gated/model")
    assert (gated.status, gated.found) == ("missing", "gated/model is gated, and no token is here")
    assert "HF_TOKEN" in gated.remedy
    assert examine_model("free/model").status == "ok"
    for name in ("tiny-factor", str(tmp_path), "./models/mine", "/a/b", "~/a"):
        assert "no name on the hub" in examine_model(name).found
    assert len(hub.asked) == 2
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert examine_model("free/model").status == "missing"
    monkeypatch.setattr(dphrl.hub, "is_cached", lambda model: True)
    assert examine_model("free/model").found == "free/model: on this machine"


def test_doctor_shows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shown = CliRunner().invoke(app, ["doctor", "--model", "tiny-factor"]).output
    assert any(line.startswith("model ") and "tiny-factor" in line for line in shown.splitlines())
