"""What the documentation shows must be what the program has: links, settings, presets, messages, figures."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import app
from dphrl.config.errors import ConfigSchema
from dphrl.config.loading import list_presets, load_config
from dphrl.experiments.show import hypervolume_table
from dphrl.experiments.suite import committed_results, list_suites, load_suite
from dphrl.tracking.metrics import BY_NAME
from tests.documentation import (
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    command_blocks,
    files_of,
    inline_code,
    links_of,
    prose_of,
)

README, RESULTS, OPERATIONS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "operations.md"
LANGUAGES = {"sh", "yaml", "python", "json", "text"}
# What keeps a command from being run by the tests.
NEEDS = {"cluster", "data", "docker", "download", "gpu", "kubernetes", "setup", "slurm", "time"}
# Programs that tests/integration/test_documented_commands.py runs.
RUN = {"dphrl", "python"}
SECTIONS = set(ConfigSchema().keys(()))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ------------------------------------------------------------ form


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


@pages
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links_of(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    assert links_of(page)
    assert broken == []


@pages
def test_every_page_is_linked_from_the_readme(page: Path) -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links_of(README) if "://" not in target}
    assert page == README or page in linked


@pages
def test_blocks_say_what_they_are(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block.place
        assert block.needs <= NEEDS, block.place


def test_the_three_ways_to_run_are_shown_briefly() -> None:
    text = README.read_text()
    start = text.index("## From a laptop to a cluster")
    section = text[start : text.index("\n## ", start + 1)]
    assert len(section.splitlines()) < 60
    for words in ("dphrl train", "ray start --head", "dphrl submit", "dphrl render kubernetes"):
        assert words in section


# ------------------------------------------------------------ commands


@pytest.mark.parametrize("block", command_blocks(), ids=lambda block: block.place)
def test_commands_are_run_or_say_what_they_need(block: Block) -> None:
    programs = {next(word for word in words if not re.match(r"\w+=", word)) for words in block.commands}
    assert block.commands
    assert block.needs or programs <= RUN, f"{block.place}: nothing runs {programs - RUN}; mark what it needs"


@pages
def test_commands_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    known = set(group.list_commands(None))  # type: ignore[attr-defined, arg-type]
    shown = [" ".join(words) for block in blocks_of(page) if block.language == "sh" for words in block.commands]
    named = re.findall(r"\bdphrl ([a-z]+)", "\n".join([*inline_code(page), *shown]))
    assert set(named) <= known


@pages
def test_presets_and_suites_exist(page: Path) -> None:
    known = {*list_presets(), *list_suites()}
    text = "\n".join([*inline_code(page), *(block.text for block in blocks_of(page))])
    named = set(
        re.findall(
            r"(?<![\w./-])(?:demo-(?:math|sql)|paper/|paper-(?:llama8b|qwen)|passk-|tune-|smollm2-)[\w./-]*", text
        )
    )
    # demo-math-* means all of them; so does a name in a path or a file's.
    named = {name for name in named if not name.endswith(("-", "/", ".svg", ".yaml")) and "/step_" not in name}
    assert {name for name in named - known if name != "smollm2-135m-instruct"} == set()


def test_examples_of_configurations_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = 0
    for page in PAGES:
        for block in blocks_of(page):
            # A file with code of its own beside it is loaded by the commands that are shown for it.
            if block.language == "yaml" and not ("plugins" in block.text or "my_rewards:" in block.text):
                (tmp_path / "example.yaml").write_text(block.text)
                load_config("example.yaml")
                loaded += 1
    assert loaded >= 4


def test_the_readmes_example_is_what_it_says(tmp_path: Path) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text(files_of(README)["mine.yaml"])
    config = load_config(str(source))
    assert config.algorithm.divergence.name == "js"
    assert config.data.prompt_template is not None
    assert config.data.prompt_template.endswith(r"\boxed{}.")
    assert "\n\n" in config.data.prompt_template


# ------------------------------------------------------------ names


@pages
def test_settings_exist(page: Path) -> None:
    schema = ConfigSchema()
    unknown = []
    for code in inline_code(page):
        match = re.fullmatch(r"([a-z]+(?:\.[a-z_]+)+)(?:[:=].*)?", code)
        if match and match[1].partition(".")[0] in SECTIONS and schema.at(tuple(match[1].split("."))) is None:
            unknown.append(code)
    assert unknown == []


@pages
def test_metrics_exist(page: Path) -> None:
    prefixes = {name.partition("/")[0] for name in BY_NAME if "/" in name}
    named = {code for code in inline_code(page) if re.fullmatch(r"[a-z]+/[a-z_/]+[a-z]", code)}
    named = {name for name in named if name.partition("/")[0] in prefixes}
    assert named - set(BY_NAME) == set()


@cache
def messages() -> list[str]:
    """Every text in the source; what is filled in stands as "\\0"."""
    found: list[str] = []
    for package in ("dphrl", "actors", "cluster"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def troubles() -> list[str]:
    """The first cells of the table of messages."""
    section = prose_of(OPERATIONS).partition("## Troubleshooting")[2]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


@pytest.mark.parametrize("message", troubles())
def test_the_messages_explained_are_the_programs(message: str) -> None:
    # Between two fillings a message may quote values of its own, so each piece is looked for by itself.
    for piece in (piece.strip(" .") for piece in message.split("...")):
        assert len(piece) < 4 or any(piece in text for text in messages()), piece


def test_the_messages_are_looked_for_in_the_source() -> None:
    assert len(troubles()) > 20
    assert not any("a message that nothing prints" in text for text in messages())


# ------------------------------------------------------------ figures


@pytest.mark.parametrize("suite", ["passk-math", "passk-even", "passk-cue", "diversity-math", "passk-sql"])
def test_the_table_of_results_is_the_committed_one(suite: str) -> None:
    results = committed_results(suite)
    text = RESULTS.read_text()
    after = text[text.index(f"results/{suite}.svg") :]
    table = after[after.index("| | Pass@1 | Pass@8 |") :].partition("\n\n")[0].splitlines()[2:]
    shown = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert list(shown) == list(results["arms"])
    columns = [("in_domain", key) for key in ("pass@1", "pass@8", "pass@16", "retention")]
    columns += [("out_of_domain", key) for key in ("pass@1", "pass@16")]
    for arm, cells in shown.items():
        found = [results["arms"][arm][domain].get(key) for domain, key in columns]
        wanted = ["-" if c is None else f"{c['mean']:.3f} ±{(c['high'] - c['low']) / 2:.3f}" for c in found]
        assert cells == wanted, arm


@pytest.mark.parametrize("suite", ["passk-math", "passk-sql", "passk-even", "passk-cue", "diversity-math", "tune-long"])
def test_the_table_of_hypervolumes_is_the_committed_one(suite: str) -> None:
    table = RESULTS.read_text().partition(f"| {suite} | etas | in domain | above the base | out of domain |\n")[2]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.partition("\n\n")[0].splitlines()]
    _, rows = hypervolume_table(committed_results(suite), 16)
    assert shown[1:] == [[str(cell) for cell in row[:5]] for row in rows]


def in_domain(suite: str, arm: str) -> tuple[str, str]:
    """Pass@1 and Pass@16 as the text writes them."""
    rates = committed_results(suite)["arms"][arm]["in_domain"]
    pass_1, pass_16 = (f"{rates[key]['mean']:.3f}".removeprefix("0") for key in ("pass@1", "pass@16"))
    return pass_1, pass_16


def test_the_threshold_s_table_is_the_committed_one() -> None:
    text = RESULTS.read_text()
    rows = [
        line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| (Threshold|Pass@1 |Pass@16 )", line)
    ]
    header, *shown = [[cell.strip() for cell in row] for row in rows[-3:]]
    arms = ["base", *(f"threshold-{value}" for value in header[2:])]
    wanted = [in_domain("tune-threshold", arm) for arm in arms]
    assert [row[1:] for row in shown] == [[rates[i] for rates in wanted] for i in (0, 1)]


@pytest.mark.parametrize(
    ("shown", "arm"),
    [
        ("base", "base"),
        *((f"k = {k}", f"k{k}") for k in (0, 1, 2, 4)),
        *((f"k = {k}, around the learner", f"k{k}-learner") for k in (2, 4)),
    ],
)
def test_the_table_of_staleness_is_the_committed_one(shown: str, arm: str) -> None:
    domains = committed_results("tune-staleness")["arms"][arm]
    rates = [domains[domain][key]["mean"] for domain in ("in_domain", "out_of_domain") for key in ("pass@1", "pass@16")]
    table = RESULTS.read_text().partition("| Staleness |")[2].partition("\n\n")[0]
    assert f"| {shown} | {' | '.join(f'{rate:.3f}'.removeprefix('0') for rate in rates)} |" in table


def test_staleness_stays_in_the_predicted_intervals() -> None:
    arms = committed_results("tune-staleness")["arms"]
    wanted = committed_results("passk-math")["arms"]["dph-f"]
    for arm in ("k0", "k1", "k2", "k4"):
        for domain, cells in wanted.items():
            for key in ("pass@1", "pass@8", "pass@16"):
                assert cells[key]["predict_low"] <= arms[arm][domain][key]["mean"] <= cells[key]["predict_high"], arm
    assert arms["k4-learner"]["in_domain"]["pass@1"]["mean"] < wanted["in_domain"]["pass@1"]["predict_low"]


@pytest.mark.parametrize(
    ("shown", "suite", "arm"),
    [
        ("base", "tune-long", "base"),
        ("GRPO", "tune-long", "grpo"),
        ("forward KL, eta 0.05", "tune-long", "dph-f-0.05"),
        ("forward KL, eta 0.1", "tune-long", "dph-f-0.1"),
        ("forward KL, eta 0.35", "tune-long", "dph-f-0.35"),
        ("forward KL, eta 0.35, two updates a step", "tune-updates", "dph-f"),
        ("Jensen-Shannon, eta 0.1", "tune-long", "dph-js-0.1"),
        ("Jensen-Shannon, eta 1.0", "tune-long", "dph-js-1.0"),
    ],
)
def test_the_longer_runs_table_is_the_committed_one(shown: str, suite: str, arm: str) -> None:
    table = RESULTS.read_text().partition("| 240 steps, seed 0 |")[2].partition("\n\n")[0]
    assert f"| {shown} | {' | '.join(in_domain(suite, arm))} |" in table


@pytest.mark.parametrize(
    ("shown", "suite", "arm"),
    [
        ("forward KL, eta 0.05", "tune-long", "dph-f-0.05"),
        ("forward KL, eta 0.1", "tune-long", "dph-f-0.1"),
        ("forward KL, eta 0.35", "tune-long", "dph-f-0.35"),
        ("Jensen-Shannon, eta 0.1", "tune-long", "dph-js-0.1"),
        ("Jensen-Shannon, eta 1.0", "tune-long", "dph-js-1.0"),
        ("reverse KL, eta 0.05", "passk-math", "rkl"),
        ("forward KL, eta 0.2", "passk-math", "dph-f"),
        ("reverse KL, eta 0.05", "passk-sql", "rkl"),
        ("forward KL, eta 0.35", "passk-sql", "dph-f"),
        ("reverse KL, eta 0.2", "passk-even", "rkl"),
        ("forward KL, eta 0.2", "passk-even", "dph-f"),
        ("reverse KL, eta 0.35", "passk-cue", "rkl"),
        ("forward KL, eta 0.35", "passk-cue", "dph-f"),
    ],
)
def test_the_table_of_directions_is_the_committed_one(shown: str, suite: str, arm: str) -> None:
    arms = committed_results(suite)["arms"]

    def share(key: str, start: str, end: str) -> str:
        rates = {name: arms[name]["in_domain"][key]["mean"] for name in (arm, start, end)}
        return f"{(rates[arm] - rates[start]) / (rates[end] - rates[start]):.2f}".removeprefix("0")

    shares = share("pass@16", "grpo", "base"), share("pass@1", "base", "grpo")
    table = (ROOT / "docs" / "algorithm.md").read_text().partition("| Suite | Steps, seeds |")[2].partition("\n\n")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{suite}` ") and f"| {shown} |" in line]
    assert row.endswith(f"| {shown} | {' | '.join([*in_domain(suite, arm), *shares])} |")
    config = load_suite(suite).config(arm, 0, "runs")
    assert f"{config.algorithm.eta:g}" == f"{float(shown.split()[-1]):g}"
    assert f"| {config.learner.num_steps}, " in row


def test_the_claims_of_passk_even_hold_in_the_committed_counts() -> None:
    """GRPO's gain at the base's Pass@16, and above the base out of domain. GRPO is below both, with its interval."""
    arms = committed_results("passk-even")["arms"]
    (base, grpo), top = (arms[name]["in_domain"] for name in ("base", "grpo")), "pass@16"
    assert grpo[top]["high"] < base[top]["low"]
    gain = grpo["pass@1"]["mean"] - base["pass@1"]["mean"]
    for name in ("dph-f", "dph-js"):
        assert arms[name]["in_domain"]["pass@1"]["mean"] - base["pass@1"]["mean"] >= 0.9 * gain
        assert arms[name]["in_domain"][top]["mean"] >= 0.98 * base[top]["mean"]
        assert arms[name]["out_of_domain"]["pass@1"]["mean"] > arms["base"]["out_of_domain"]["pass@1"]["mean"]
    assert arms["grpo"]["out_of_domain"]["pass@1"]["high"] < arms["base"]["out_of_domain"]["pass@1"]["low"]


def test_the_claims_of_diversity_math_hold_in_the_committed_counts() -> None:
    arms = committed_results("diversity-math")["arms"]
    base = arms["base"]["in_domain"]
    level = ["rkl", "alpha-0.5", "dph-f", "dph-f-entropy", "dph-js", "sft", "maxrl", "kl-cov"]
    for name in level:
        assert arms[name]["in_domain"]["pass@16"]["mean"] >= base["pass@16"]["mean"] - 0.003
        assert 0.095 <= arms[name]["in_domain"]["pass@1"]["mean"] - base["pass@1"]["mean"] <= 0.115
    rates = [arms[name]["in_domain"]["pass@1"] for name in level]
    widths = [rate["high"] - rate["mean"] for rate in rates]
    assert max(rate["mean"] for rate in rates) - min(rate["mean"] for rate in rates) < min(widths)
    for name in ("grpo", "clip-cov", "w-reinforce", "replay"):
        assert arms[name]["in_domain"]["pass@16"]["high"] < base["pass@16"]["low"], name
    # A pull to the stored answers keeps what their prompts as ordinary rows do not.
    assert arms["sft"]["in_domain"]["pass@16"]["low"] > arms["replay"]["in_domain"]["pass@16"]["high"]


def test_the_arms_that_both_suites_have_are_the_same_runs() -> None:
    even, every = load_suite("passk-even"), load_suite("diversity-math")
    for arm in even.arms:
        settings = [suite.config(arm, 1, "runs").model_dump(exclude={"run_name", "run_dir"}) for suite in (even, every)]
        assert settings[0] == settings[1]
    rows = [
        [row for row in committed_results(suite.name)["rows"] if row["arm"] in ("base", *even.arms)]
        for suite in (even, every)
    ]
    assert rows[0] == rows[1]


def test_the_plan_that_is_shown_is_the_printed_one() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    command = re.search(r"^dphrl (plan paper/sql-dph-js --simulate .*)$", page, re.MULTILINE)
    assert command is not None
    done = CliRunner().invoke(app, command[1].split())
    shown = page.partition("The first prints, among other things:\n\n```text\n")[2].partition("```")[0]
    lines = [line for line in shown.splitlines() if line.strip()]
    assert len(lines) >= 10
    assert [line for line in lines if line not in done.output.splitlines()] == []


def test_etas_of_the_released_code_are_the_printed_ones_times_its_share() -> None:
    # eta / 7: 0.01 is 0.00143, 0.05 is 0.00714 and 0.2 is 0.0286, as the presets and the table of one scale have them.
    for name, printed in (("dph-f", 0.01), ("alpha-0.5", 0.01), ("dph-js", 0.2), ("dph-js-definition", 0.2)):
        for task in ("math", "sql"):
            paper, repo = (load_config(f"paper/{task}-{name}{end}").algorithm.eta for end in ("", "-repo"))
            assert paper == printed
            assert repo == pytest.approx(printed / 7, rel=2e-3)
    text = (ROOT / "docs" / "algorithm.md").read_text()
    # 0.05 / 7 = 0.00714 and 0.2 / 7 = 0.0286, rounded to one digit.
    assert "| forward KL, alpha | 0.01 to 0.05 | 0.0014 to 0.007 |" in text
    assert "| Jensen-Shannon | 0.05 to 0.2 | 0.007 to 0.03 |" in text
