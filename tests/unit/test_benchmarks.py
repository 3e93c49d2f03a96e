"""What the benchmarks make of their measurements, and what they measure with. None of them is run here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dphrl.config.schema import Config
from dphrl.tiny import ensure_tiny_model
from dphrl.types import Completion, Prompt, RewardResult, RewardStatus, RolloutGroup
from tests.benchmarks import _peer, e2e_vs_trl, rollout_overhead, tail
from tests.benchmarks._collect_child import digest
from tests.benchmarks._lengths import hazards, make_talker
from tests.benchmarks._peer import make_unending
from tests.benchmarks._sides import ROOT, checked_out, side
from tests.benchmarks._text_reward import reward

ECHO = """
import json, sys, time
print("a library says something", flush=True)
print("answer {}", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order.get("fail"):
        sys.exit("what went wrong")
    until = time.process_time() + order["busy_s"]
    while time.process_time() < until:
        pass
    print("answer " + line, end="", flush=True)
"""


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    child = tmp_path / "echo.py"
    child.write_text(ECHO)
    return child


def test_a_side_answers_in_turn_and_counts_its_own_cpu_time(echo: Path) -> None:
    with side(echo, [], [ROOT]) as child:
        assert child.answer() == {}
        assert child.ask({"busy_s": 1.0}) == {"busy_s": 1.0}
        answer = child.measure({"busy_s": 0.2})
    assert 0.15 < answer.pop("cpu_s") < 0.9
    assert answer == {"busy_s": 0.2}


def test_a_side_that_ends_says_why(echo: Path) -> None:
    with side(echo, [], [ROOT]) as child:
        child.answer()
        with pytest.raises(SystemExit, match="what went wrong"):
            child.ask({"fail": True})


def test_an_unknown_revision_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, checked_out("no-such-revision"):
        pass
    assert ended.value.code == 2
    assert "no-such-revision" in capsys.readouterr().err


def test_lengths_are_log_normal_up_to_the_cap() -> None:
    mean, sigma, cap = 50.0, 0.8, 4000
    reached, share = 1.0, []
    for hazard in hazards(mean, sigma, cap):
        share.append(reached * hazard)
        reached *= 1 - hazard
    assert reached == 0
    # Rounding up adds half a token.
    assert sum(t * p for t, p in enumerate(share, start=1)) == pytest.approx(mean + 0.5, rel=0.01)
    median = math.exp(math.log(mean) - sigma**2 / 2)
    assert sum(share[: math.floor(median)]) < 0.5 < sum(share[: math.ceil(median)])
    assert hazards(mean, sigma, 10)[-1] == 1


def test_the_model_ends_its_answers_with_these_hazards(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    cap = 12
    make_talker(tmp_path, mean=5, sigma=0.7, cap=cap, num_layers=1)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    question = [{"role": "user", "content": "FACTOR 0 4 1 5 8 ?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    answer = tokenizer.convert_tokens_to_ids([f"t{t}" for t in range(1, cap)])
    with torch.no_grad():
        probabilities_TV = model(torch.tensor([[*prompt, *answer]])).logits[0].double().softmax(-1)[len(prompt) - 1 :]
    ends = probabilities_TV[:, tokenizer.eos_token_id].tolist()
    assert ends == pytest.approx(hazards(5, 0.7, cap), abs=1e-3)
    goes_on = [probabilities_TV[t, token].item() for t, token in enumerate(answer)]
    assert [a + b for a, b in zip(ends, [*goes_on, 0], strict=True)] == pytest.approx([1] * cap, abs=1e-3)


def model_folder(folder: Path, tokens: list[str]) -> Path:
    folder.mkdir()
    added = [{"content": token, "id": index} for index, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text('{"eos_token_id": 0, "vocab_size": 9}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [0], "pad_token_id": 0}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<eos>"}')
    return folder


def test_an_unending_model_ends_with_a_token_it_never_says_and_leaves_the_original_alone(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", ["<eos>", "<unk>", "<repo_name>"])
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    made = tmp_path / "made"
    made.mkdir()
    make_unending(model, made)
    read = {name: json.loads((made / name).read_text()) for name in before if name.endswith("config.json")}
    assert read["config.json"] == {"eos_token_id": 2, "vocab_size": 9}
    assert read["generation_config.json"] == {"eos_token_id": 2, "pad_token_id": 0}
    assert read["tokenizer_config.json"] == {"eos_token": "<repo_name>", "pad_token": "<eos>"}
    assert (made / "model.safetensors").is_symlink()
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_a_vocabulary_without_a_silent_token_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(ValueError, match="<repo_name>"):
        make_unending(model_folder(tmp_path / "model", ["<eos>"]), made)


def test_the_text_reward_tells_completions_apart() -> None:
    texts = [f"answer {i}" for i in range(200)]
    scores = [reward(text, "") for text in texts]
    assert scores == [reward(text, "another") for text in texts]
    assert len(set(scores)) == len(scores)
    # None reads as right: only a 1 would.
    assert all(0 <= score < 1 for score in scores)


@pytest.mark.parametrize("small", [True, False])
def test_both_sides_of_the_step_get_the_same_work(small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math").mkdir()
    (tmp_path / "math/gsm8k_train.jsonl").write_text("")
    monkeypatch.setenv("DPHRL_DATA", str(tmp_path))
    config = Config.model_validate(e2e_vs_trl.dphrl_settings("a-model", "bfloat16", small=small))
    assert config.rollout.num_prompts * config.rollout.num_samples == (64 if small else 32)
    assert config.data.train.limit == config.rollout.num_prompts + config.reference.rows_per_step
    assert (config.rollout.threads_per_engine, config.learner.threads_per_rank) == (2, 2)
    assert config.uses_reference_samples
    assert not config.uses_reference_model


@pytest.mark.parametrize(
    ("options", "num_parts", "weights", "autocast"),
    [
        (["--small"], 1, "float32", False),
        (["--small", "--peer-rows", "16", "--dtype", "bfloat16"], 4, "float32", True),
        (["--small", "--dtype", "bfloat16", "--peer-weights", "bfloat16"], 1, "bfloat16", False),
    ],
)
def test_trl_gets_the_prompts_that_dphrl_explores(
    options: list[str], num_parts: int, weights: str, autocast: bool, tmp_path: Path
) -> None:
    arguments = e2e_vs_trl.parse(options)
    model = make_unending(ensure_tiny_model(), tmp_path)
    settings = e2e_vs_trl.trl_settings(e2e_vs_trl.dphrl_settings(str(model), arguments.dtype, small=True), arguments)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    assert [tokenizer(text)["input_ids"] for text in settings["prompts"]] == settings["token_ids"]
    assert len(settings["prompts"]) == 8
    assert (settings["num_samples"], settings["max_tokens"]) == (8, 64)
    assert (settings["num_parts"], settings["weights"], settings["autocast"]) == (num_parts, weights, autocast)
    assert tokenizer.eos_token == "<unk>"


def test_a_missing_requirement_of_trl_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_peer, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(SystemExit) as ended:
        _peer.ensure_trl()
    assert ended.value.code == 2
    assert "no_such_package" in capsys.readouterr().err


def test_a_digest_is_of_the_tokens_whatever_the_order_of_prompts() -> None:
    def group(name: str, *tokens: int) -> RolloutGroup:
        completion = Completion(name, 0, tokens, "", (0.0,) * len(tokens), "stop", 0)
        return RolloutGroup(Prompt(name, "", (1,), "", "d"), (completion,), (RewardResult(RewardStatus.WRONG),))

    groups = [group("a", 1, 2), group("b", 3)]
    assert digest(groups) == digest(groups[::-1])
    assert digest(groups) != digest([group("a", 1, 2), group("b", 4)])


def step_answers(seconds: float, num_tokens: int, cpu_s: float = 1.0) -> dict[str, float]:
    laps = {f"{lap}_s": seconds / 4 for lap in e2e_vs_trl.LAPS}
    return {"seconds": seconds, "num_tokens": num_tokens, "cpu_s": cpu_s, "flat": 0.0, "rows": 8.0, **laps}


def test_steps_are_compared_round_by_round_and_by_the_token() -> None:
    seen = {
        "plain": [step_answers(s, 100, cpu) for s, cpu in ((1, 1), (4, 3), (9, 5))],
        "rehearsing": [step_answers(s, 50) for s in (2, 2, 2)],
        "trl": [step_answers(s, 100, cpu) for s, cpu in ((4, 4), (10, 4), (30, 5))],
    }
    result = e2e_vs_trl.summary(seen, {"plain_vs_trl": 0.45, "rehearsing_vs_trl": 0.5})
    assert result["plain_vs_trl"] == 0.3  # of 0.25, 0.4 and 0.3
    assert result["plain_vs_trl_cpu"] == 0.75
    assert result["rehearsing_vs_trl"] == 0.2
    # Half of the tokens in the same time are half of the speed.
    assert result["rehearsing_vs_trl_per_token"] == 0.4
    assert result["trl_ms_per_token"] == 100.0
    assert result["within_bars"] is True
    # By the step it is within, by the token it is not.
    assert e2e_vs_trl.summary(seen, {"plain_vs_trl": 0.45, "rehearsing_vs_trl": 0.3})["within_bars"] is False


def test_without_the_data_the_step_on_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPHRL_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        e2e_vs_trl.dphrl_settings("a-model", "float32", small=False)
    assert ended.value.code == 2
    assert "DPHRL_DATA" in capsys.readouterr().err


class Recorded:
    """A side that remembers its orders."""

    def __init__(self) -> None:
        self.orders: list[dict[str, Any]] = []

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.orders.append(order)
        return {"seconds": 2.0, "num_tokens": 10, "digest": "d"}


def test_each_round_of_rollouts_has_prompts_of_its_own_and_both_sides_the_same() -> None:
    settings, per_round = rollout_overhead.make_settings("tiny", "float32", 4)
    sides: dict[str, Any] = {"pool": Recorded(), "plain": Recorded()}
    seen = rollout_overhead.measure(sides, 3, per_round)
    assert [len(answers) for answers in seen.values()] == [3, 3]
    assert sides["pool"].orders == sides["plain"].orders
    taken = [i for o in sides["pool"].orders for i in range(o["first"], o["first"] + o["count"])]
    assert taken == list(range(Config.model_validate(settings).data.train.limit or 0))


def test_rollouts_are_compared_by_their_rates() -> None:
    seen = {
        "pool": [{"seconds": 2.0, "num_tokens": 90}, {"seconds": 1.0, "num_tokens": 40}],
        "plain": [{"seconds": 1.0, "num_tokens": 50}, {"seconds": 1.0, "num_tokens": 50}],
    }
    result = rollout_overhead.summary("tiny", seen)
    assert result["tiny_pool_vs_plain"] == pytest.approx(0.85)  # of 0.9 and 0.8
    assert result["tiny_within_bar"] is True
    assert rollout_overhead.summary("smollm2", seen)["smollm2_within_bar"] is False


def test_engines_of_the_tail_have_a_thread_each_and_room_on_a_small_machine() -> None:
    stage = tail.stage_settings("a-model", 96, tail.parse([]))
    for settings in (tail.step_settings("a-model"), stage):
        config = Config.model_validate(settings)
        assert (config.rollout.num_engines, config.rollout.threads_per_engine) == (2, 1)
        needed = config.learner.cpus_per_rank + 2 * config.rollout.cpus_per_engine + config.reward.cpus_per_worker
        assert needed <= (config.cluster.num_cpus or 0)


def test_each_figure_of_the_tail_has_the_same_prompts_and_seed_in_a_round() -> None:
    new, old = Recorded(), Recorded()
    asked: dict[str, Any] = {key: (new, order) for key, order in tail.step_plans("new").items()}
    asked |= {key: (old, order) for key, order in tail.step_plans("old").items()}
    seen = tail.measure(asked, 2)
    assert {name: len(answers) for name, answers in seen.items()} == dict.fromkeys(asked, 2)
    places = [(order["first"], order["count"], order["seed"]) for order in (*new.orders, *old.orders)]
    assert len(set(places)) == 3
    assert sum(order.get("split", False) for order in new.orders) == 3


def answered(*seconds: float, digest: str = "a") -> list[dict[str, Any]]:
    return [{"seconds": s, "num_tokens": 100, "digest": digest} for s in seconds]


def test_the_tail_compares_with_the_whole_share_of_the_old_side_if_there_is_one() -> None:
    seen = {"step": answered(2, 3), "share": answered(2, 3)}
    alone = tail.step_summary(seen)
    assert alone["step_vs_share"] == 1
    assert "step_vs_old" not in alone
    assert alone["rounds_with_same_tokens"] == 1
    both = tail.step_summary({**seen, "old_step": answered(4, 4), "old_share": answered(2.5, 2, digest="b")})
    assert both["step_vs_share"] == pytest.approx((0.8 + 1.5) / 2)
    assert both["step_vs_own_share"] == 1
    assert both["step_vs_old"] == pytest.approx((0.5 + 0.75) / 2)
    assert both["rounds_with_same_tokens"] == 0
