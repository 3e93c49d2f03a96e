"""The output head: from hidden states to log-probs in one call."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from dphrl.algo.logprobs import token_logprobs


class LogprobHead(nn.Linear):
    """The LM's own output head, with its own parameters, which can also give log-probs without the logits.

    All of a micro-batch's tokens go through one call of one module. So where weights are sharded (ZeRO-3), whose hooks
    gather a module's parameters around its call, the head is gathered once in forward and once in backward, however
    many chunks of tokens there are.
    """

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a second weight
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias

    def logprobs(self, hidden_ND: Tensor, target_ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N): see `token_logprobs`."""
        # Hooks are of the call, so the way in is the module's call, not a method beside it.
        return cast(tuple[Tensor, Tensor], self(hidden_ND, target_ids_N, temperature))

    def forward(self, input: Tensor, target_ids_N: Tensor | None = None, temperature: float = 1.0) -> Any:
        if target_ids_N is None:
            return super().forward(input)
        return token_logprobs(input, self.weight, target_ids_N, bias_V=self.bias, temperature=temperature)


def install_logprob_head(lm: nn.Module) -> LogprobHead:
    """Put a LogprobHead in the place of `lm`'s output head, under the same name and with the same parameters.

    Raises ValueError when `lm` has no linear output head.
    """
    head = cast(Any, lm).get_output_embeddings()
    if isinstance(head, LogprobHead):
        return head
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the output head is {type(head).__name__}, where only a linear layer is supported")
    installed = LogprobHead(head).train(head.training)
    cast(Any, lm).set_output_embeddings(installed)
    return installed
