"""Pass@k of base and trained model: estimators, the stage that samples and grades, the table that shows both."""

from dphrl.evaluation.estimators import pass_at_k

__all__ = ["pass_at_k"]
