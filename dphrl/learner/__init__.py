"""The learner on one rank: policy model, micro-batches, update, checkpoints. Plain torch and DeepSpeed share it."""
