"""Settings explain themselves: in their source, on the command line, as comments, and to editors."""

from __future__ import annotations

import compileall
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app
from dphrl.config.check import check_setting
from dphrl.config.editor import editor_schema
from dphrl.config.errors import ConfigSchema
from dphrl.config.explain import WIDTH, explain_setting, explained_yaml
from dphrl.config.learner import LearnerConfig
from dphrl.config.loading import ConfigError, list_presets, load_config, parse_yaml
from dphrl.config.schema import Config
from dphrl.config.section import Section
from dphrl.experiments.suite import Suite, list_suites, load_suite

ROOT = Path(__file__).resolve().parent.parent.parent


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def sections(above: type[Section] = Section) -> Iterator[type[Section]]:
    for section in above.__subclasses__():
        if section.__module__.startswith("dphrl."):
            yield section
            yield from sections(section)


# Config and Suite are imported, so that their sections are among these.
FIELDS = {f"{section.__name__}.{name}": info for section in sections() for name, info in section.model_fields.items()}


# ------------------------------------------------------------ in the source


def test_the_fields_of_every_section_are_looked_at() -> None:
    names = {key.partition(".")[0] for key in FIELDS}
    assert {Config.__name__, Suite.__name__, "DatasetConfig", "AlgorithmConfig", "ClusterConfig"} <= names
    assert len(FIELDS) > 100


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_explained(field: str) -> None:
    text = FIELDS[field].description or ""
    assert re.match(r"[A-Z]|\w+: |vLLM ", text), f"{field} lacks an explanation below it: {text!r}"
    assert text.endswith("."), f"{field}: its explanation is no whole sentence: {text!r}"
    assert len(text) > len("More of the same.")


def test_a_section_that_inherits_keeps_its_explanations() -> None:
    class MoreConfig(LearnerConfig):
        extra: int = 0
        """One more."""

    fields = MoreConfig.model_fields
    assert fields["extra"].description == "One more."
    assert fields["lr"].description == LearnerConfig.model_fields["lr"].description != ""


def test_without_its_source_the_package_works_and_explains_nothing(tmp_path: Path) -> None:
    for part in ("algo", "config", "presets"):
        shutil.copytree(ROOT / "dphrl" / part, tmp_path / "dphrl" / part)
    shutil.copy(ROOT / "dphrl" / "__init__.py", tmp_path / "dphrl")
    assert compileall.compile_dir(tmp_path / "dphrl", quiet=1, legacy=True)
    with zipfile.ZipFile(tmp_path / "dphrl.zip", "w") as archive:
        for path in sorted((tmp_path / "dphrl").rglob("*")):
            if path.suffix in (".pyc", ".yaml") and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(tmp_path))
    shutil.rmtree(tmp_path / "dphrl")
    program = (
        "from dphrl.config.explain import explain_setting, explained_yaml\n"
        "from dphrl.config.editor import editor_schema\n"
        "from dphrl.config.schema import Config\n"
        "import dphrl; assert '.zip' in dphrl.__file__\n"
        "print(explain_setting('learner.lr'))\n"
        "print(explain_setting('learner').splitlines()[-1])\n"
        "data = {'train': {'name': 'a', 'kind': 'tiny'}}\n"
        "text = explained_yaml(Config.model_validate({'data': data, 'algorithm': {'divergence': None}}))\n"
        "print('  lr: 1' in text, '# The' in text)\n"
        "print(editor_schema()['$defs']['LearnerConfig']['properties']['lr'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "dphrl.zip")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "learner.lr: a number > 0; default 1e-06",
        "  timeout_s               1800.0",
        "True False",
        "{'default': 1e-06, 'exclusiveMinimum': 0, 'maximum': 1000000000, 'type': 'number'}",
    ]


# ------------------------------------------------------------ dphrl config KEY


def description(section: str, field: str) -> str:
    return str(FIELDS[f"{section}.{field}"].description)


def test_a_setting_is_explained() -> None:
    first, empty, *text = explain_setting("learner.lr").splitlines()
    assert first == "learner.lr: a number > 0; default 1e-06"
    assert empty == ""
    assert " ".join(text) == " ".join(description("LearnerConfig", "lr").split())
    assert all(len(line) <= WIDTH for line in text)


@pytest.mark.parametrize(
    ("key", "first"),
    {
        "seed": "seed: an integer >= 0; default 0",
        "run_name": r"run_name: text matching ^\w[\w.-]*$; default run",
        "model.dtype": "model.dtype: one of auto, float32, bfloat16; default auto",
        "rollout.enforce_eager": "rollout.enforce_eager: true or false or null; default null",
        "evaluation.k": "evaluation.k: a list, each item an integer >= 1; default [1, 8]",
        "evaluation.k.0": "evaluation.k.0: an integer >= 1",
        "data.system_prompt": 'data.system_prompt: text; default ""',
        "data.train.name": "data.train.name: text; must be given",
        "data.train.where": "data.train.where: a mapping of names to values; default {}",
        "data.evaluation": "data.evaluation: a list of sections; default []",
        "data.evaluation.limit": "data.evaluation.0.limit: an integer >= 1 or null; default null",
        "data.evaluation.2.limit": "data.evaluation.2.limit: an integer >= 1 or null; default null",
        " learner. ": "learner: a section",
        "data.train": "data.train: a section",
        "data.train.where.level": "data.train.where: a mapping of names to values; default {}",
        "algorithm.divergence": "algorithm.divergence: NAME, or {name: NAME, PARAMETER: VALUE}; `dphrl presets "
        "--algorithms` lists them; default forward_kl",
        "algorithm.divergence.alpha": "algorithm.divergence.alpha: a parameter",
    }.items(),
)
def test_what_a_setting_may_be(key: str, first: str) -> None:
    assert explain_setting(key).splitlines()[0] == first


def test_a_section_lists_its_settings_with_a_line_each() -> None:
    title, empty, text, _, *rows = explain_setting("sync").splitlines()
    assert (title, empty, text) == ("sync: a section", "", description("Config", "sync"))
    assert [row.split()[:2] for row in rows] == [
        ["backend", "auto"],
        ["num_probes", "8"],
        ["timeout_s", "1800.0"],
        ["max_mean_logprob_gap", "null"],
    ]
    # The first sentence alone.
    assert rows[0].endswith("How new weights reach the engines.")


def test_of_a_list_of_sections_the_items_settings_are_listed() -> None:
    rows = explain_setting("data.evaluation").splitlines()
    assert [row.split()[0] for row in rows if row.startswith("  ")] == list(ConfigSchema().keys(("data", "train")))
    assert any(row.startswith("  name ") and " required " in row for row in rows)


def test_of_a_method_s_parameter_it_is_told_who_takes_it() -> None:
    assert explain_setting("algorithm.divergence.alpha").splitlines()[-1] == "alpha takes alpha: a number > 0 and < 1"


def test_in_a_section_a_method_shows_the_name_of_its_default() -> None:
    rows = [row.split()[:2] for row in explain_setting("algorithm").splitlines()]
    assert ["divergence", "forward_kl"] in rows
    assert ["advantage", "group_normalized"] in rows


def test_no_key_lists_every_section() -> None:
    rows = [row.split()[:2] for row in explain_setting("").splitlines() if row.startswith("  ")]
    assert [name for name, _ in rows] == list(Config.model_fields)
    assert ["learner", "section"] in rows
    assert ["seed", "0"] in rows


UNKNOWN = {
    "lr": "lr: unknown key; did you mean learner.lr?",
    "learner.lrr": "learner.lrr: unknown key; did you mean learner.lr?",
    "learnr.lr": "learnr.lr: unknown key; did you mean learner.lr?",
    "optimizer.lr": "optimizer.lr: unknown key; did you mean learner.lr?",
    "num_step": "num_step: unknown key; did you mean learner.num_steps?",
    "data.trian.limit": "data.trian.limit: unknown key; did you mean data.train.limit?",
    "top_k": "top_k: unknown key; did you mean rollout.top_k?",
    "zzz": "zzz: unknown key; known here: run_name, run_dir, seed, ",
    "sync.zzz": "sync.zzz: unknown key; known here: backend, num_probes, timeout_s, max_mean_logprob_gap",
    "seed.x": "seed.x: unknown key; seed is an integer >= 0, not a section",
    "learner.lr.x.y": "learner.lr.x.y: unknown key; learner.lr is a number > 0, not a section",
    "data.evaluation.limt": "data.evaluation.limt: unknown key; did you mean data.evaluation.0.limit?",
    "algorithm.divergence.beta": "algorithm.divergence.beta: no method that comes with dphrl has this parameter; known "
    "here: alpha",
    "algorithm.divergence.alpha.x": "algorithm.divergence.alpha.x: no method that comes with dphrl has this parameter",
    "algorithm.dvergence": "algorithm.dvergence: unknown key; did you mean algorithm.divergence?",
    "timeout_s": "timeout_s: unknown key; did you mean reward.timeout_s or rollout.timeout_s or ",
}


@pytest.mark.parametrize(("key", "wanted"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_one_line_with_what_may_be_meant(key: str, wanted: str) -> None:
    result = invoke("config", key)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dphrl: error: {wanted}")


# ------------------------------------------------------------ dphrl config KEY=VALUE

GOOD = ["learner.lr=1e-4", "seed=3", "model.dtype=bfloat16", "evaluation.k=[1, 4]", "data.train.limit=null"]
GOOD += ["data.evaluation.1.limit=3", "data.train.where={level: [4, 5]}", "learner={lr: 1e-3}"]
GOOD += ["algorithm.divergence=js", "algorithm.divergence.alpha=0.5", "algorithm.divergence={name: alpha, alpha: 0.5}"]


@pytest.mark.parametrize("text", GOOD)
def test_a_value_that_can_be_set(text: str) -> None:
    result = invoke("config", text)
    assert result.exit_code == 0, result.stderr
    assert result.output.startswith(f"{text.partition('=')[0]}: ")
    last = result.output.splitlines()[-1]
    assert last == f"{text} fits this setting; `dphrl plan CONFIG '{text}'` checks it together with the others"


BAD = {
    "learner.lr=fast": 'learner.lr: expected a number > 0 (got "fast")',
    "learner.num_steps=true": "learner.num_steps: expected an integer >= 1 (got true)",
    "model.dtype=bfloat": 'model.dtype: expected one of auto, float32, bfloat16 (got "bfloat"); did you mean bfloat16?',
    "data.evaluation.3.limit=0": "data.evaluation.3.limit: expected an integer >= 1 or null (got 0)",
    "algorithm.divergence.alpha=x": 'algorithm.divergence.alpha: expected a number > 0 and < 1 (got "x")',
    "algorithm.divergence.alpha=true": "algorithm.divergence.alpha: expected a number > 0 and < 1 (got true)",
    "algorithm.divergence.alpha='0.5'": 'algorithm.divergence.alpha: expected a number > 0 and < 1 (got "0.5")',
    "algorithm.divergence.params.alpha=1": "algorithm.divergence.params.alpha: expected a number > 0 and < 1 (got 1)",
    "algorithm.divergence=frob": "algorithm.divergence: unknown divergence 'frob'; known: none, alpha, ",
    "algorithm.divergence={name: alpha}": "algorithm.divergence: divergence 'alpha' needs alpha: a number > 0 and < 1",
    "data.train.where.level={a: 1}": "data.train.where: level: expected a value or a list of values (got {'a': 1})",
    "learner={lr: 0}": "learner.lr: expected a number > 0 (got 0)",
    "learner={lrr: 1}": "learner.lrr: unknown key; did you mean learner.lr?",
    "evaluation.k=[1": 'evaluation.k: the value is not valid YAML (got "[1")',
}


@pytest.mark.parametrize(("text", "wanted"), BAD.items(), ids=BAD)
def test_a_value_that_cannot_be_set_is_one_line_below_the_explanation(text: str, wanted: str) -> None:
    result = invoke("config", text)
    assert result.exit_code == 2
    assert text.startswith(result.stdout.partition(":")[0])
    (line,) = result.stderr.splitlines()
    assert line.removeprefix("dphrl: error: ").removeprefix("command line: ").startswith(wanted)


def test_a_value_without_a_key() -> None:
    result = invoke("config", "=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert '"=3" has an empty key' in result.stderr


def test_one_value_is_checked_without_what_else_its_section_needs() -> None:
    assert check_setting("data.system_prompt=Think.").startswith("data.system_prompt=Think. fits")
    with pytest.raises(ConfigError, match=r"^data.max_prompt_tokens: expected an integer >= 1 \(got 0\)$"):
        check_setting("data.max_prompt_tokens=0")


def test_the_command_says_how_it_is_used() -> None:
    output = invoke("config", "--help").output
    assert "Examples:\n" in output
    for example in re.findall(r"^  dphrl (config.*?)(?: > .*)?$", output, flags=re.MULTILINE):
        result = invoke(*example.split())
        assert result.exit_code == 0, (example, result.output)
    assert "\n  config " in invoke("--help").output


# ------------------------------------------------------------ comments: dphrl plan CONFIG --yaml


def comments_above(text: str) -> dict[str, str]:
    """Of every key that has comments right above it, the dotted path and their words."""
    found, words, path = {}, [], []
    for line in text.splitlines():
        indent, body = len(line) - len(line.lstrip()), line.strip()
        if body.startswith("#"):
            words.append(body.removeprefix("# "))
            continue
        if (key := re.match(r"(\w+):", body)) and indent % 2 == 0:
            path = [*path[: indent // 2], key[1]]
            if words:
                found[".".join(path)] = " ".join(words)
        words = []
    return found


@pytest.mark.parametrize("name", ["demo-math", "paper/sql-dph-js", "smollm2-gsm8k-cpu"])
def test_every_setting_has_its_explanation_above_it(name: str) -> None:
    # Of a section that is null there are no settings to show.
    found = comments_above(explained_yaml(load_config(name, ["model.lora={}"])))
    schema = ConfigSchema()
    assert set(found) == set(schema.places())
    for place, text in found.items():
        node = schema.at(tuple(place.split(".")))
        assert node is not None
        assert text.startswith(" ".join(node["description"].split())), place
    assert found["model.dtype"].endswith(" One of auto, float32, bfloat16.")


def test_comments_are_as_deep_as_their_key_and_not_too_wide() -> None:
    lines = explained_yaml(load_config("demo-sql")).splitlines()
    for line, below in itertools.pairwise(lines):
        if line.lstrip().startswith("#"):
            assert len(line) <= WIDTH
            assert line.index("#") == len(below) - len(below.lstrip())


@pytest.mark.parametrize("name", list_presets())
def test_with_comments_a_configuration_reads_back_equal(tmp_path: Path, name: str) -> None:
    config = load_config(name, ["learner.lr=1e-7", "data.system_prompt='# no comment'"])
    path = tmp_path / "config.yaml"
    path.write_text(explained_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config
    # Other YAML readers agree with ours about it.
    assert Config.model_validate(yaml.safe_load(path.read_text())) == config


@pytest.mark.parametrize("words", ["a\nb", "seed: 1", "# x\n\nlr: 3\n  k: v", "x " * 200 + "\nrollout:\n", "ünï\t'\""])
def test_a_text_that_looks_like_settings_stays_whole(tmp_path: Path, words: str) -> None:
    config = load_config("smollm2-gsm8k-cpu", [f"data.train.where={{level: {json.dumps(words)}}}"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"system_prompt": words})})
    path = tmp_path / "config.yaml"
    path.write_text(explained_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_plan_prints_the_explanations(tmp_path: Path) -> None:
    result = invoke("plan", "demo-math", "seed=9", "--yaml")
    assert comments_above(result.output)["learner.lr"] == " ".join(description("LearnerConfig", "lr").split())
    (tmp_path / "mine.yaml").write_text(result.output)
    assert load_config(str(tmp_path / "mine.yaml")) == load_config("demo-math", ["seed=9"])


# ------------------------------------------------------------ editors: dphrl config --schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(invoke("config", "--schema").output)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(validator: jsonschema.Draft202012Validator, tree: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_suits_the_schema(validator: jsonschema.Draft202012Validator, name: str) -> None:
    assert problems(validator, parse_yaml(list_presets()[name], name)) == []
    assert problems(validator, load_config(name).model_dump(mode="json")) == []


@pytest.mark.parametrize("name", list_suites())
def test_the_arms_of_every_suite_suit_the_schema(validator: jsonschema.Draft202012Validator, name: str) -> None:
    suite = load_suite(name)
    assert problems(validator, parse_yaml(list_presets()[suite.base], suite.base)) == []
    for arm in suite.arms:
        tree: dict[str, Any] = {"base": suite.base}
        for key, value in {**suite.settings, **suite.arms[arm]}.items():
            *parents, last = key.split(".")
            here = tree
            for part in parents:
                here = here.setdefault(part, {})
            here[last] = value
        assert problems(validator, tree) == []


ALONE = "data: {train: {name: a}}"
SUITS = {
    "alone": ALONE,
    "a base": "base: demo-math",
    "a base's path": "base: ../mine.yaml",
    "part of a base's data set": "{base: demo-math, data: {train: {limit: 3}}}",
    "a divergence's name": f"{{{ALONE}, algorithm: {{divergence: js}}}}",
    "no divergence": f"{{{ALONE}, algorithm: {{divergence: null}}}}",
    "a divergence with a parameter": f"{{{ALONE}, algorithm: {{divergence: {{name: alpha, alpha: 0.5}}}}}}",
    "a divergence in full": f"{{{ALONE}, algorithm: {{divergence: {{name: alpha, params: {{alpha: 0.5}}}}}}}}",
    "a plugin's divergence": f"{{{ALONE}, algorithm: {{divergence: {{name: mine, beta: [1]}}}}}}",
    "a part of a base's divergence": "{base: demo-math-alpha-0.5, algorithm: {divergence: {alpha: 0.4}}}",
    "an advantage's name": f"{{{ALONE}, algorithm: {{advantage: leave_one_out}}}}",
    "a policy loss in full": f"{{{ALONE}, algorithm: {{policy_loss: {{name: gspo, params: {{}}}}}}}}",
    "a list": f"{{{ALONE}, evaluation: {{k: [1, 2]}}}}",
    "null": f"{{{ALONE}, cluster: {{num_cpus: null}}}}",
    "a filter": "data: {train: {name: a, where: {level: [4, 5], subject: Algebra}}}",
    "a reward's own parameters": f"{{{ALONE}, reward: {{name: 'mine:grade', params: {{deep: {{a: [1]}}}}}}}}",
}
SUITS_NOT = {
    "nothing": "{}",
    "no data": "seed: 1",
    "a data set without a name": "data: {train: {kind: tiny}}",
    "no training data": "data: {evaluation: []}",
    "an item without a name": "{base: demo-math, data: {evaluation: [{kind: tiny}]}}",
    "a wrong key": f"{{{ALONE}, rolout: {{}}}}",
    "a wrong key in a section": f"{{{ALONE}, learner: {{rl: 1}}}}",
    "a wrong key in a data set": "data: {train: {name: a, limits: 3}}",
    "a wrong key in an item": "data: {train: {name: a}, evaluation: [{name: a, limits: 3}]}",
    "a wrong choice": f"{{{ALONE}, model: {{dtype: float16}}}}",
    "a number too small": f"{{{ALONE}, learner: {{num_steps: 0}}}}",
    "text for a number": f"{{{ALONE}, learner: {{lr: fast}}}}",
    "a list's name for a base": "{base: [demo-math]}",
    "text for a parameter": f"{{{ALONE}, algorithm: {{divergence: {{name: alpha, alpha: x}}}}}}",
    "a parameter that a divergence lacks": f"{{{ALONE}, algorithm: {{divergence: {{name: js, alpha: 0.5}}}}}}",
    "a divergence without its parameter": f"{{{ALONE}, algorithm: {{divergence: {{name: alpha}}}}}}",
    "a divergence's name without its parameter": f"{{{ALONE}, algorithm: {{divergence: alpha}}}}",
    "a parameter out of range": f"{{{ALONE}, algorithm: {{divergence: {{name: alpha, params: {{alpha: 1}}}}}}}}",
    "no advantage": f"{{{ALONE}, algorithm: {{advantage: null}}}}",
    "null for a section": f"{{{ALONE}, learner: null}}",
}


@pytest.mark.parametrize("case", SUITS)
def test_what_loads_suits_the_schema(validator: jsonschema.Draft202012Validator, case: str) -> None:
    assert problems(validator, parse_yaml(SUITS[case], case)) == []


@pytest.mark.parametrize("case", SUITS_NOT)
def test_what_does_not_load_suits_it_not(validator: jsonschema.Draft202012Validator, case: str, tmp_path: Path) -> None:
    assert problems(validator, parse_yaml(SUITS_NOT[case], case))
    (tmp_path / "my.yaml").write_text(SUITS_NOT[case])
    with pytest.raises(ConfigError):
        load_config(str(tmp_path / "my.yaml"))


def fields_of(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of the schema's sections, as SECTION.key."""
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        for key, field in section["properties"].items():
            yield f"{name}.{key}", field


def test_an_editor_finds_explanations_and_defaults() -> None:
    schema = editor_schema()
    fields = dict(fields_of(schema))
    assert "Config.base" in fields
    assert "demo-math" in fields["Config.base"]["anyOf"][0]["enum"]
    for name, field in fields.items():
        assert len(field["description"].splitlines()) == 1, name
        assert "title" not in field, name
        if "default" in field:
            inner = {"$defs": schema["$defs"], **field}
            jsonschema.validate(field["default"], inner, jsonschema.Draft202012Validator)
    # Of a section the default is an object, with all that is in it.
    assert schema["properties"]["learner"]["default"] == LearnerConfig().model_dump(mode="json")
    for section in ("model", "algorithm", "cluster"):
        assert isinstance(schema["properties"][section]["default"], dict)
    assert schema["$defs"]["LearnerConfig"]["properties"]["lr"]["default"] == 1e-6
    advantages = schema["$defs"]["AlgorithmConfig"]["properties"]["advantage"]["anyOf"][0]["enum"]
    assert {"group_normalized", "leave_one_out"} <= set(advantages)
    assert schema["$defs"]["ModelConfig"]["properties"]["dtype"]["enum"] == ["auto", "float32", "bfloat16"]


def test_no_section_of_the_schema_takes_unknown_keys() -> None:
    schema = editor_schema()
    assert [name for name, section in schema["$defs"].items() if section["additionalProperties"] is not False] == []
    assert schema["additionalProperties"] is False


def test_the_schema_is_of_the_whole() -> None:
    result = invoke("config", "learner", "--schema")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "dphrl: error: --schema: is of the whole configuration; leave learner out\n"


def test_the_schema_says_which_draft_it_is() -> None:
    text = invoke("config", "--schema").output
    assert json.loads(text)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert textwrap.dedent(text) == text
