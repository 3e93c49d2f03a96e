"""Configuration: what loads, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dphrl.config.loading import ConfigError, config_to_yaml, dump_config, list_presets, load_config
from dphrl.config.schema import Config

MINIMAL = "data: {train: {name: tiny, kind: tiny}}\n"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines_of(source: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return caught.value.lines


# ------------------------------------------------------------ mistakes on the command line

CL = "command line: "
OVERRIDE_MISTAKES = {
    "rollout.num_sample=4": CL + "rollout.num_sample: unknown key; did you mean rollout.num_samples?",
    "lr=1e-4": CL + "lr: unknown key; did you mean learner.lr?",
    "timeout_s=3": CL + "timeout_s: unknown key; did you mean reward.timeout_s or rollout.timeout_s or",
    "sync.zzz=1": CL + "sync.zzz: unknown key; known here: backend, num_probes, timeout_s, max_mean_logprob_gap",
    "learner.num_steps=0": CL + "learner.num_steps: expected an integer >= 1 (got 0)",
    "learner.num_steps=ten": CL + 'learner.num_steps: expected an integer >= 1 (got "ten")',
    "learner.num_steps=1.5": CL + "learner.num_steps: expected an integer >= 1 (got 1.5)",
    "learner.num_steps=true": CL + "learner.num_steps: expected an integer >= 1 (got true)",
    "learner.num_steps=null": CL + "learner.num_steps: expected an integer >= 1 (got null)",
    "learner.num_steps=1e30": CL + "learner.num_steps: expected an integer >= 1 (got 1e+30)",
    "rollout.num_samples=1000000000000": CL
    + "rollout.num_samples: expected an integer >= 1 and <= 100,000 (got 1000000000000)",
    "rollout.num_engines=1000000": CL + "rollout.num_engines: expected an integer >= 1 and <= 10,000 (got 1000000)",
    "rollout.num_prompts=10000000": "rollout.num_prompts=10000000 x rollout.num_samples=8 are 80,000,000 completions",
    "rollout.timeout_s=1e10": CL + "rollout.timeout_s: expected a number > 0 and <= 1,000,000,000 (got 10000000000.0)",
    "seed=9223372036854775808": CL + "seed: expected an integer >= 0 and <= 9,223,372,036,854,775,807 (got 92233",
    f"seed={'9' * 5000}": CL + 'seed: expected an integer >= 0 (got "99999999999999',
    f"seed=0x{'f' * 5000}": CL + 'seed: expected an integer >= 0 (got "0xffffffffffff',
    f"data.train.where={'[' * 1000}": CL + "data.train.where: the value is not valid YAML (got",
    "learner.lr=-1e-6": CL + "learner.lr: expected a number > 0 (got -1e-06)",
    "learner.lr=.inf": CL + "learner.lr: expected a number > 0 (got Infinity)",
    "learner.lr=.nan": CL + "learner.lr: expected a number > 0 (got NaN)",
    "rollout.max_staleness=-1": CL + "rollout.max_staleness: expected an integer >= 0 (got -1)",
    "learner.lr_final_fraction=2": CL + "learner.lr_final_fraction: expected a number >= 0 and <= 1 (got 2)",
    "deterministic=maybe": CL + 'deterministic: expected true or false (got "maybe")',
    "rollout.enforce_eager=12": CL + "rollout.enforce_eager: expected true or false or null (got 12)",
    "data.train.kind=tinny": CL
    + "data.train.kind: expected one of tiny, tiny_even, tiny_cue, tiny_sql, arithmetic, math, text_to_sql "
    + '(got "tinny"); did you mean tiny?',
    "learner=3": CL + "learner: expected a section with the keys num_steps, lr, lr_schedule,",
    "data.train=null": CL + "data.train: expected a section with the keys name, kind, layout, path,",
    "data.evaluation.0.limit=2": "data.evaluation: expected a list, each item a section with the keys name, kind",
    "evaluation.k=4": CL + "evaluation.k: expected a list, each item an integer >= 1 (got 4)",
    "evaluation.k=[0, 4]": CL + "evaluation.k.0: expected an integer >= 1 (got 0)",
    "evaluation.k=[64]": CL + "evaluation.k=64 needs at least as many samples; set evaluation.num_samples >= 64",
    "reference.threshold=9": CL + "reference.threshold=9 can never be reached with num_samples=8; set",
    "rollout.temperature=0.005": CL + "rollout.temperature=0.005: engines would sample at 0.01 instead; set it to 0.01",
    "rollout.top_p=0.9": CL + "rollout.top_p=0.9, top_k=0: samples would come from another distribution",
    "rollout.num_samples=1": CL + "rollout.num_samples=1: a group of one has no advantage; set",
    "algorithm.num_minibatches=3": "rollout.num_prompts=32 does not divide into algorithm.num_minibatches=3; make",
    "learner.micro_batch_tokens=10": CL + "learner.micro_batch_tokens=10 cannot hold one sequence of",
    "data.prompt_template=Solve!": CL + "data.prompt_template: 'Solve!' lacks {question}; add it",
    "algorithm.divergence=forward": CL + "algorithm.divergence: unknown divergence 'forward'; known: none,",
    "algorithm.divergence=alpha": CL + "algorithm.divergence: divergence 'alpha' needs",
    "algorithm.divergence={name: alpha, alpha: 2}": CL + "algorithm.divergence: divergence 'alpha' takes alpha: a",
    "algorithm.advantage=group_normalised": "; did you mean group_normalized?",
    "algorithm.policy_loss={name: clipped, clip_low: 0.1}": "policy loss 'clipped' has no parameter 'clip_low'; it",
    "algorithm.estimator=definition": CL + "algorithm.estimator=definition is Jensen-Shannon's; set algorithm.diverg",
    "algorithm.kl_estimator=k1": CL + "algorithm.kl_estimator=k1 is for reverse_kl on rollouts; set",
    "algorithm.overlong_buffer_tokens=300": CL + "algorithm.overlong_buffer_tokens=300 exceeds rollout.max_tokens=256",
    "algorithm.divergence={alpha: 0.5}": CL + "algorithm.divergence.name: expected text (got null)",
    "algorithm.divergence={name: alpha, alpha: x}": CL
    + "algorithm.divergence: divergence 'alpha' takes alpha: a number > 0 and < 1 (got \"x\")",
    "data.train.name.x=2": CL + 'data.train.name.x: data.train.name is a value, not a section (got "tiny"); set',
    "no-equals-sign": CL + "\"no-equals-sign\" has no '='; write an override as section.key=value",
    "=3": CL + '"=3" has an empty key; write section.key=value',
    "rollout..num_samples=3": CL + '"rollout..num_samples=3" has an empty key',
    "evaluation.k=[1": CL + 'evaluation.k: the value is not valid YAML (got "[1"); quote it:',
}


@pytest.mark.parametrize(("override", "wanted"), OVERRIDE_MISTAKES.items(), ids=lambda text: text[:60])
def test_a_mistaken_override_is_one_line(tmp_path: Path, override: str, wanted: str) -> None:
    (line,) = lines_of(write(tmp_path, "my.yaml", MINIMAL), override)
    assert wanted in line
    assert "\n" not in line
    assert line.startswith((CL, str(tmp_path / "my.yaml: ")))


# ------------------------------------------------------------ mistakes in a file

FILE_MISTAKES = {
    "": "my.yaml: data: missing; add it: a section with the keys train, evaluation,",
    "data: {train: {kind: tiny}}": "my.yaml: data.train.name: missing; add it: text",
    "{base: demo-math, data: {train: {path: a.jsonl}}}": "my.yaml: data.train.path: kind: tiny makes its "
    "problems itself and reads no file; set kind: math or text_to_sql, or remove path",
    "- a": 'my.yaml: expected keys and values at the top level (got ["a"])',
    "seed: 1\n  run_name: x": "my.yaml:2: not valid YAML: mapping values are not allowed here; correct",
    "seed: [1": "my.yaml:1: not valid YAML: ",
    "seed: 1\nseed: 2": "my.yaml:2: not valid YAML: key 'seed' appears twice",
    "1: x": "my.yaml:1: not valid YAML: a key must be text",
    "{a: b}: x": "my.yaml:1: not valid YAML: a key must be text",
    "seed: !!python/name:os.system x": "my.yaml:1: not valid YAML: could not determine a constructor",
    "run_name: 2026\n" + MINIMAL: r"my.yaml: run_name: expected text matching ^\w[\w.-]*$ (got 2026); put it in quotes",
    "base: demo-maths": "my.yaml: base: demo-maths: no such preset or file; did you mean the preset demo-math?",
    "base: [a]": 'my.yaml: base: expected a preset\'s name or a YAML path (got ["a"])',
    "base: my.yaml": "base: the files inherit in a circle (",
    "a: &a {b: *a}": "my.yaml: not valid YAML: an alias holds itself; correct the file",
    "a:\n  " + "[" * 100_000: "my.yaml:2: not valid YAML: nested more than 50 deep; correct this line",
    "a: [x]\n" + "x" * 2**20: "my.yaml: not valid YAML: more than 1 MiB, which no configuration has; correct the file",
    "a0: &a0 [x]\n"
    + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 10)): "my.yaml: not valid YAML: "
    "aliases make more than 200,000 values of it; correct the file",
    "seed: " + "9" * 100_000 + "\n" + MINIMAL: 'my.yaml: seed: expected an integer >= 0 (got "9999',
}


@pytest.mark.parametrize(("text", "wanted"), FILE_MISTAKES.items(), ids=lambda text: text[:60])
def test_a_mistake_in_a_file_is_answered(tmp_path: Path, text: str, wanted: str) -> None:
    lines = lines_of(write(tmp_path, "my.yaml", text))
    assert any(wanted in line for line in lines), lines
    assert all("\n" not in line for line in lines)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00")
    assert "my.yaml: cannot be read as UTF-8 text" in lines_of(str(tmp_path / "my.yaml"))[0]


def test_unknown_sources_are_named(tmp_path: Path) -> None:
    assert lines_of("demo-mth")[0].startswith(
        "demo-mth: no such preset or file; did you mean the preset demo-math? presets: demo-math, "
    )
    assert "zzz.yaml: no such file; presets: " in lines_of(str(tmp_path / "zzz.yaml"))[0]
    assert "did you mean the preset demo-math?" in lines_of("demo-math.yaml")[0]
    assert ": is a folder; name a YAML file" in lines_of(str(tmp_path))[0]
    assert "no such preset or file" in lines_of("../presets/demo-math")[0]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    source = write(tmp_path, "my.yaml", MINIMAL + "learner: {lr: fast}\nrolout: {}")
    lines = lines_of(source, "oops", "seed=-1")
    assert len(lines) == 4
    assert any(line == f'{source}: learner.lr: expected a number > 0 (got "fast")' for line in lines)
    assert any(line == f"{source}: rolout: unknown key; did you mean rollout?" for line in lines)
    assert any(line == f"{CL}seed: expected an integer >= 0 (got -1)" for line in lines)


def test_a_problem_is_laid_to_the_file_that_has_it(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL + "learner: {lr: fast}")
    child = write(tmp_path, "child.yaml", "base: base.yaml\nseed: x")
    assert lines_of(child) == (
        f'{child}: seed: expected an integer >= 0 (got "x")',
        f'{base}: learner.lr: expected a number > 0 (got "fast")',
    )


# ------------------------------------------------------------ overrides that hold


def test_overrides_are_yaml(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "my.yaml", MINIMAL),
        [
            "learner.lr=1e-6",
            "rollout.enforce_eager=null",
            "evaluation.k=[1, 4]",
            "algorithm.divergence={name: alpha, alpha: 0.5}",
            "data.evaluation=[{name: a, kind: tiny}, {name: b, kind: tiny}]",
            "data.evaluation.1.limit=3",
            "model.path=/a=b",
        ],
    )
    assert config.learner.lr == 1e-6
    assert config.rollout.enforce_eager is None
    assert config.evaluation.k == (1, 4)
    assert (config.algorithm.divergence.name, config.algorithm.divergence.params) == ("alpha", {"alpha": 0.5})
    assert [dataset.limit for dataset in config.data.evaluation] == [None, 3]
    assert config.model.path == "/a=b"


def test_a_list_item_that_is_not_there(tmp_path: Path) -> None:
    source = write(tmp_path, "my.yaml", "data: {train: {name: t}, evaluation: [{name: a}]}")
    assert lines_of(source, "data.evaluation.1.limit=3") == (
        f"{CL}data.evaluation: a list of 1 has no item 1; write data.evaluation.0 to data.evaluation.0",
    )


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("2026", "2026"),
        ("1e-6", "1e-6"),
        ("true", "true"),
        ("", ""),
        ('"quoted"', "quoted"),
        ("He said: {question} [", "He said: {question} ["),
        ("{question}", "{question}"),
        ("a\\boxed{} # b", "a\\boxed{}"),
    ],
)
def test_words_for_a_text_field_are_text(tmp_path: Path, raw: str, value: str) -> None:
    config = load_config(write(tmp_path, "my.yaml", MINIMAL), [f"data.system_prompt={raw}"])
    assert config.data.system_prompt == value


def test_null_empties_an_optional_field(tmp_path: Path) -> None:
    source = write(tmp_path, "my.yaml", MINIMAL + "cluster: {num_cpus: 3}")
    assert load_config(source).cluster.num_cpus == 3
    assert load_config(source, ["cluster.num_cpus=null"]).cluster.num_cpus is None


def test_an_override_does_not_reach_through_an_alias(tmp_path: Path) -> None:
    text = "data: {train: &t {name: a, kind: tiny, limit: 5}, evaluation: [*t]}"
    config = load_config(write(tmp_path, "my.yaml", text), ["data.train.limit=7"])
    assert (config.data.train.limit, config.data.evaluation[0].limit) == (7, 5)


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "my.yaml", MINIMAL), ["seed=1", "seed=2"]).seed == 2


# ------------------------------------------------------------ inheritance, presets, round trip


def test_a_child_merges_into_its_base(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", MINIMAL + "learner: {lr: 1e-3, num_steps: 7}\nseed: 1\nevaluation: {k: [1, 2]}")
    write(tmp_path, "b.yaml", "base: a.yaml\nlearner: {num_steps: 8}\nseed: 2")
    config = load_config(write(tmp_path, "c.yaml", "base: b.yaml\nseed: 3\nevaluation: {k: [4]}"))
    assert (config.learner.lr, config.learner.num_steps, config.seed) == (1e-3, 8, 3)
    assert config.evaluation.k == (4,)


def test_a_base_may_be_a_preset_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.yaml", "base: demo-math\nseed: 4")
    config = load_config(write(tmp_path / "sub", "b.yaml", "base: ../a.yaml"))
    assert (config.seed, config.run_name) == (4, "demo-math")


def test_another_divergence_leaves_its_predecessors_parameters(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", MINIMAL + "algorithm: {divergence: {name: alpha, alpha: 0.2}}")
    other = load_config(write(tmp_path, "b.yaml", "base: a.yaml\nalgorithm: {divergence: {name: js}}"))
    assert (other.algorithm.divergence.name, other.algorithm.divergence.params) == ("js", {})
    same = load_config(write(tmp_path, "c.yaml", "base: a.yaml\nalgorithm: {divergence: {alpha: 0.8}}"))
    assert same.algorithm.divergence.params == {"alpha": 0.8}


def test_a_longer_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml")
    write(tmp_path, "b.yaml", "base: a.yaml")
    assert "inherit in a circle" in lines_of(str(tmp_path / "a.yaml"))[0]


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert config.run_name == name.replace("/", "-")
    assert list_presets()[name].startswith("# ")
    assert load_config(name, ["seed=5"]).seed == 5


def test_the_arms_of_the_demo_differ_in_the_divergence_only() -> None:
    def without_arm(name: str) -> dict[str, object]:
        tree = load_config(name).model_dump()
        del tree["run_name"], tree["algorithm"]["divergence"], tree["algorithm"]["eta"]
        return tree

    assert without_arm("demo-math") == without_arm("demo-math-js") == without_arm("demo-math-grpo")
    assert load_config("demo-math").uses_divergence
    assert not load_config("demo-math-grpo").uses_divergence


ODD_NAMES = ["1e-6", "yes", "null", "0x1f", "2026-01-01", "12:30", "a: b", "ünï", "# x", "", "1.", "~", "'", "a\nb"]


@pytest.mark.parametrize("word", ODD_NAMES)
def test_what_is_dumped_reads_back_equal(tmp_path: Path, word: str) -> None:
    text = yaml.safe_dump({"data": {"train": {"name": "a"}, "system_prompt": ""}})
    config = load_config(write(tmp_path, "my.yaml", text))
    data = config.data.model_copy(update={"system_prompt": word})
    config = config.model_copy(update={"data": data})
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", list_presets())
def test_presets_round_trip(tmp_path: Path, name: str) -> None:
    # A divergence with a parameter, and a number YAML 1.1 takes for text; the estimator must suit the divergence.
    alpha = ["algorithm.divergence={name: alpha, alpha: 0.5}", "algorithm.estimator=reference"]
    config = load_config(name, [*alpha, "algorithm.kl_estimator=null", "learner.lr=1e-7"])
    source = write(tmp_path, "config.yaml", config_to_yaml(config))
    assert load_config(source) == config
    # Other YAML readers agree with ours about it.
    assert Config.model_validate(yaml.safe_load(Path(source).read_text())) == config
