"""Pass@k of the base and the trained model: estimators, the stage that samples and grades, the table of both."""

from dphrl.evaluation.estimators import pass_at_k

__all__ = ["pass_at_k"]
