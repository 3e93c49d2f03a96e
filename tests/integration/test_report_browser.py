"""The report in a real browser: no error on the console, its script at work, light and dark. Needs Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.report_folders import render, write_reference, write_run

pytestmark = pytest.mark.integration

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
# A browser left alone looks for updates and its vendor's services.
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def browse(page: Path, *flags: str) -> tuple[str, list[str]]:
    """(the document after its scripts ran, what they wrote to the console)."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *QUIET, profile, "--enable-logging=stderr", "--virtual-time-budget=3000", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    arms = {"grpo": "none", "dph-f": "forward_kl", "dph-js": "js"}
    for place, (arm, divergence) in enumerate(arms.items()):
        for seed in (0, 1):
            folder = tmp_path / "suite" / f"{arm}-s{seed}"
            correct = (8, 2 * place + seed, 0, 2)
            write_run(folder, seed=seed, arm=("passk", arm), divergence=divergence, num_steps=60, correct=correct)
            write_reference(folder, [4, 3, 0, 1], [4, 4, 4, 4])
    render(tmp_path, tmp_path / "suite")
    return tmp_path / "out" / "report.html"


@needs_browser
def test_no_error_reaches_the_console_and_the_script_runs(page: Path) -> None:
    document, console = browse(page, "--dump-dom")
    assert console == []
    # Only page.js takes the charts' <title> away and puts it into the label.
    labels = re.findall(r'<svg[^>]*aria-label="([^"]+)"', document)
    assert any(label.startswith("Pass@k on factor") for label in labels)
    # ... and fills the browser of completions.
    assert "FACTOR 9" in document


@needs_browser
def test_an_error_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<!doctype html><script>absent()</script>")
    _, console = browse(tmp_path / "broken.html", "--dump-dom")
    assert len(console) == 1
    assert "absent is not defined" in console[0]


@needs_browser
@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_it_is_painted_in_the_reader_s_colours(page: Path, scheme: str, is_dark: bool) -> None:
    picture = page.parent / f"{scheme}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if is_dark else ["--blink-settings=preferredColorScheme=1"]
    _, console = browse(page, *dark, f"--screenshot={picture}", "--window-size=1200,1600")
    assert console == []
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)[..., :3]
    background = pixels[-40:, :8].mean()
    assert background < 0.3 if is_dark else background > 0.7
    # Something stands on it: a blank page has one colour.
    assert pixels.std() > 0.03
