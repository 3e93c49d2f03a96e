"""SFT on the stored answers: the control that rehearses without a divergence.

Its gradient is that of plain cross-entropy, -grad log pi_theta, at every rehearsal token. That of forward KL,
f(u) = u - 1 - log u, is (u - 1) grad log pi_theta. So the two differ by u grad log pi_theta, whose mean over the tokens
that pi_ref draws is sum pi_theta grad log pi_theta = 0: over fresh samples of pi_ref they have one mean gradient, that
of KL(pi_ref, pi_theta). They are not the same on a buffer of few samples, which are right answers only:

- where the policy is the initial one (u = 1), forward KL has no gradient, and SFT has the one of full size;
- forward KL pulls a token back to u = 1 from both sides, and SFT makes it ever likelier.
"""

from __future__ import annotations

import torch

from dphrl.algo.divergences import Divergence, register_divergence


@register_divergence("sft")
def _sft() -> Divergence:
    """No divergence: cross-entropy on stored answers (SFT), less that of the initial policy, so that it starts at 0."""
    return Divergence("sft", torch.neg, lambda x: -torch.ones_like(x), signed=True)
