"""The learner on one rank: the policy model, micro-batches, the update, checkpoints. Plain torch and DeepSpeed share it."""
