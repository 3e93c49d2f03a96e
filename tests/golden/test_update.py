"""One whole update against a loop of plain formulas, written here without any of the project's own.

Both start from the same random float64 model, the same groups and the same rehearsal samples. The loop below knows no
padding, no micro-batches and no vectors over rows: one completion after the other, token by token, then AdamW by
its definition. Parameters and metrics have to agree to rounding.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dphrl.batch import make_batch
from dphrl.learner.policy import PolicyModel
from dphrl.learner.torch_engine import TorchEngine
from dphrl.learner.update import UpdateSettings, run_update
from dphrl.types import Completion, Prompt, ReferenceSample, RewardResult, RewardStatus, RolloutGroup

TEMPERATURE = 0.7
VOCABULARY = 13
STEP = 3  # from 0, of 9: the linear schedule is at lr x (1 - (1 - 0.1) x 3 / 8)
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's usual ones

# Of the data, by ratio: so drawn that each bound of the loss is met by some token in the second mini-batch.
SEEDS = {"token": 2, "sequence": 38, "gspo": 38}
ARMS = {
    "forward_kl": {"divergence": "forward_kl"},
    "js_definition": {"divergence": "js", "estimator": "definition"},
    "k3_on_rollouts": {"divergence": "reverse_kl", "estimator": "rollout", "kl_estimator": "k3"},
}


def random_model(seed: int) -> nn.Module:
    """A Llama of 2,000 weights with tied embeddings, in float64 throughout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(shape).double().eval()
    # Llama's own norm goes through float32, which would be the coarsest thing in the comparison.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(8, eps=1e-6).double())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model


def f32(value: float) -> float:
    """As the learner holds what it is given: weights, advantages and stored log-probs are float32 arrays."""
    return float(torch.tensor(value, dtype=torch.float32))


# --------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Two mini-batches: a group of three completions, one of them right, and two rehearsal samples each."""

    groups: list[RolloutGroup]
    samples: list[ReferenceSample]


def make_data(model: nn.Module, reference: nn.Module, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (count,), generator=generator).tolist())

    def near(model: nn.Module, prompt: tuple[int, ...], ids: tuple[int, ...], spread: float) -> tuple[float, ...]:
        exact, _ = plain_logprobs(model, prompt + ids, len(prompt))
        noise = torch.randn(len(ids), generator=generator, dtype=torch.float64) * spread
        return tuple(min(-1e-3, float(x)) for x in exact.detach() + noise)

    groups = []
    for name, lengths, right in (("a", (5, 9, 3), 0), ("b", (11, 4, 6), 1)):
        prompt = Prompt(name, name, tokens(3), "", "data")
        completions = []
        for i, length in enumerate(lengths):
            ids = tokens(length)
            logprobs = near(model, prompt.token_ids, ids, 0.6)
            completions.append(Completion(name, i, ids, "", logprobs, "stop", 7))
        results = [RewardResult(RewardStatus.CORRECT if i == right else RewardStatus.WRONG) for i in range(3)]
        groups.append(RolloutGroup(prompt, tuple(completions), tuple(results)))
    samples = []
    for length in (6, 2, 3, 8):
        prompt_ids, ids = tokens(2), tokens(length)
        samples.append(ReferenceSample("r", prompt_ids, ids, near(reference, prompt_ids, ids, 0.1)))
    return Data(groups, samples)


# ------------------------------------------------------------------------- the plain formulas


def plain_logprobs(model: nn.Module, token_ids: tuple[int, ...], num_prompt: int) -> tuple[Tensor, Tensor]:
    """Of each completion token: its log-prob, and the entropy of the distribution it stands in."""
    logits = model(torch.tensor([token_ids])).logits[0] / TEMPERATURE
    logprobs, entropies = [], []
    for place in range(num_prompt, len(token_ids)):
        row = logits[place - 1]
        distribution = row - row.exp().sum().log()
        logprobs.append(distribution[token_ids[place]])
        entropies.append(-(distribution.exp() * distribution).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@dataclass
class Outcome:
    metrics: dict[str, float] = field(default_factory=dict)
    # How often each bound was at work: the comparison must not be of a case in which none is.
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("low", "high", "dual", "capped", "norm"), 0))

    def add(self, name: str, value: float) -> None:
        self.metrics[name] = self.metrics.get(name, 0.0) + value


def plain_update(model: nn.Module, reference: nn.Module, data: Data, config: Any) -> Outcome:
    """The step on `model` in place, by the formulas."""
    algorithm, learner = config.algorithm, config.learner
    lr = learner.lr * (1 - 0.9 * STEP / 8)
    outcome, rehearse = Outcome(), algorithm.estimator != "rollout"
    parts = []
    for half in (0, 1):
        group, samples = data.groups[half], data.samples[2 * half : 2 * half + 2] if rehearse else []
        # Scores 1, 0, 0: mean 1/3; squared deviations 4/9 + 1/9 + 1/9 = 2/3, / 2 = 1/3.
        advantages = [f32((r.score - 1 / 3) / (math.sqrt(1 / 3) + 1e-6)) for r in group.results]
        policy_weight = f32(1 / sum(len(c.token_ids) for c in group.completions))
        reference_weight = f32(1 / sum(len(s.token_ids) for s in samples)) if samples else 0.0
        parts.append((group, samples, advantages, policy_weight, reference_weight))

    with torch.no_grad():  # pi_old: the weights at the start of the step, for every mini-batch
        olds = [
            [plain_logprobs(model, group.prompt.token_ids + c.token_ids, 3)[0] for c in group.completions]
            for group, *_ in parts
        ]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for number, ((group, samples, advantages, policy_weight, reference_weight), old) in enumerate(
        zip(parts, olds, strict=True), start=1
    ):
        objective = torch.zeros((), dtype=torch.float64)
        for completion, advantage, old_row in zip(group.completions, advantages, old, strict=True):
            ids = group.prompt.token_ids + completion.token_ids
            logprobs, entropies = plain_logprobs(model, ids, 3)
            with torch.no_grad():
                of_reference = plain_logprobs(reference, ids, 3)[0]
            mean_log_ratio = float((logprobs - old_row).detach().mean())
            for t, engine in enumerate(f32(x) for x in completion.logprobs):
                log_ratio = logprobs[t] - old_row[t]
                if (
                    algorithm.ratio == "sequence" or algorithm.policy_loss.name == "gspo"
                ):  # the value of the whole completion's, the gradient of the token's
                    log_ratio = mean_log_ratio + log_ratio - log_ratio.detach()
                surrogate, clipped = plain_surrogate(log_ratio.exp(), advantage, algorithm, outcome)
                importance = math.exp(float(old_row[t]) - engine)
                outcome.seen["capped"] += importance > algorithm.importance_cap
                importance = min(importance, algorithm.importance_cap)
                outcome.add("policy/loss", policy_weight * importance * float(surrogate.detach()) / 2)
                outcome.add("policy/clip_fraction", policy_weight * clipped / 2)
                outcome.add("policy/importance_mean", policy_weight * importance / 2)
                outcome.add("policy/entropy", policy_weight * float(entropies[t].detach()) / 2)
                objective = objective + policy_weight * importance * surrogate
                objective = objective - algorithm.entropy_bonus * policy_weight * entropies[t]
                if algorithm.estimator != "reference":
                    log_u = float(logprobs[t].detach()) - float(of_reference[t])
                    value, slope = plain_on_rollouts(log_u, algorithm.estimator)
                    weight = policy_weight * min(
                        math.exp(float(logprobs[t].detach()) - engine), algorithm.importance_cap
                    )
                    outcome.add("divergence/loss", weight * value / 2)
                    outcome.add("divergence/log_u_mean", weight * log_u / 2 / (2 if rehearse else 1))
                    objective = objective + algorithm.eta * weight * slope * logprobs[t]
                if number == 1:
                    gap = abs(float(old_row[t]) - engine)
                    outcome.metrics["rollout/logprob_gap_max"] = max(
                        gap, outcome.metrics.get("rollout/logprob_gap_max", 0.0)
                    )
        for sample in samples:
            logprobs, _ = plain_logprobs(model, sample.prompt_token_ids + sample.token_ids, 2)
            for t, stored in enumerate(f32(x) for x in sample.logprobs):
                log_u = logprobs[t] - stored
                u = log_u.exp()
                value = u - 1 - log_u if algorithm.estimator == "reference" else (2 / (u + 1)).log()
                parts_of_term = 1 if algorithm.estimator == "reference" else 2
                outcome.add("divergence/loss", reference_weight * float(value.detach()) / 2)
                outcome.add("divergence/log_u_mean", reference_weight * float(log_u.detach()) / 2 / parts_of_term)
                objective = objective + algorithm.eta * reference_weight * value
        plain_adamw(model, objective, moments, number, lr, learner, outcome)
    return outcome


def plain_surrogate(ratio: Tensor, advantage: float, algorithm: Any, outcome: Outcome) -> tuple[Tensor, int]:
    """What is minimised at one token, by cases, and whether clip_low or clip_high was at work."""
    value = float(ratio.detach())
    if advantage >= 0:
        clipped = value > 1 + algorithm.clip_high
        outcome.seen["high"] += clipped
        return -advantage * (ratio * 0 + 1 + algorithm.clip_high if clipped else ratio), int(clipped)
    if value < 1 - algorithm.clip_low:
        outcome.seen["low"] += 1
        return -advantage * (ratio * 0 + 1 - algorithm.clip_low), 1
    if value > algorithm.dual_clip:
        outcome.seen["dual"] += 1
        return ratio * 0 + f32(-advantage * algorithm.dual_clip), 0  # a product of float32 numbers alone
    return -advantage * ratio, 0


def plain_on_rollouts(log_u: float, estimator: str) -> tuple[float, float]:
    """Value, and what multiplies the gradient of log pi_theta: of reverse KL by k3, or of Jensen-Shannon's half."""
    u = math.exp(log_u)
    if estimator == "rollout":
        return 1 / u - 1 + log_u, log_u
    value = math.log(2 * u / (u + 1))
    return value, value + 1 / (u + 1)


def plain_adamw(
    model: nn.Module, objective: Tensor, moments: Any, number: int, lr: float, learner: Any, outcome: Outcome
) -> None:
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(objective, list(model.parameters()))
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    outcome.add("learner/grad_norm", norm / 2)
    outcome.seen["norm"] += norm > learner.grad_clip
    scale = min(1.0, learner.grad_clip / (norm + 1e-6))
    with torch.no_grad():
        for name, parameter, gradient in zip(names, model.parameters(), gradients, strict=True):
            first, second = moments[name]
            gradient = gradient * scale
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient * gradient
            moments[name] = first, second
            step = (first / (1 - BETA1**number)) / ((second / (1 - BETA2**number)).sqrt() + EPSILON)
            parameter.copy_(parameter - lr * learner.weight_decay * parameter - lr * step)


# ----------------------------------------------------------------------------------- the comparison


def configure(make_config: Any, arm: str, ratio: str, packing: str, micro_batch_tokens: int) -> Any:
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.4}
    chosen = {"ratio": "token", "policy_loss": "gspo"} if ratio == "gspo" else {"ratio": ratio}
    if ratio != "token":
        bounds = {"clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.02}
    return make_config(
        algorithm={
            **ARMS[arm],
            **bounds,
            "eta": 0.3,
            **chosen,
            "entropy_bonus": 0.2,
            "importance_cap": 1.5,
            "num_minibatches": 2,
        },
        learner={
            "num_steps": 9,
            "lr": 0.05,
            "lr_schedule": "linear",
            "lr_final_fraction": 0.1,
            "weight_decay": 0.1,
            "grad_clip": 0.5,
            "packing": packing,
            "micro_batch_tokens": micro_batch_tokens,
        },
        rollout={"temperature": TEMPERATURE, "num_prompts": 2, "num_samples": 3},
    )


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("ratio", SEEDS)
@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [40, 512])
def test_one_update_equals_the_formulas(
    make_config: Any, arm: str, ratio: str, packing: str, micro_batch_tokens: int
) -> None:
    config = configure(make_config, arm, ratio, packing, micro_batch_tokens)
    ours, reference = random_model(0), random_model(1)
    theirs = copy.deepcopy(ours)
    data = make_data(ours, reference, SEEDS[ratio])

    policy, resident = PolicyModel(ours, TEMPERATURE), PolicyModel(reference, TEMPERATURE).requires_grad_(False)
    rehearsal = data.samples if config.uses_reference_samples else []
    batch = make_batch(config, STEP, 7, data.groups, rehearsal)
    metrics = run_update(batch, TorchEngine(policy, config, resident), UpdateSettings.from_config(config))

    expected = plain_update(theirs, reference, data, config)
    share = expected.metrics.pop("policy/clip_fraction")  # a sum of float32 weights alone
    assert metrics["policy/clip_fraction"] == pytest.approx(share, rel=1e-6)
    assert {name: metrics[name] for name in expected.metrics} == pytest.approx(expected.metrics, rel=1e-10, abs=1e-12)
    for (name, got), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert min(expected.seen.values()) > 0, f"a bound that no token or gradient meets: {expected.seen}"
