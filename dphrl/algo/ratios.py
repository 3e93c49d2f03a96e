"""Probability ratios from log-ratios, which stay finite whatever the log-ratio is."""

from __future__ import annotations

from torch import Tensor

# A ratio beyond e^20 = 4.9e8, or below its inverse, comes of no healthy update: trust regions and caps act long before.
# Without the bound exp overflows at 88 in float32, and where a trust region then cuts the infinite ratio, its gradient
# is 0 x inf = NaN.
MAX_LOG_RATIO = 20.0


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) within e^-20 .. e^20, elementwise in any shape; NaN stays NaN.

    Outside the bound the gradient is 0 and does not continue as a divergence's does. Above it the trust region or the
    dual clip has cut the gradient already; below it the ratio, which is its own derivative, is under 2.1e-9. To
    continue would make a token whose log-prob is broken the largest of the batch.
    """
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def is_beyond(log_ratio: Tensor) -> Tensor:
    """Where `bounded_ratio` is held at its bound."""
    return log_ratio.abs() > MAX_LOG_RATIO
