"""dphrl: reinforcement learning with verifiable rewards that keeps a language model's diversity."""

__version__ = "0.1.0"
