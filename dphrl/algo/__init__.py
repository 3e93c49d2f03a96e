"""The algorithm as formulas: divergences, advantages, policy losses, log-probs. Tensors in, tensors out."""
