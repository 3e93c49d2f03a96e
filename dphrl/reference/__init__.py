"""The reference stage samples the initial policy once, splits the prompts, and keeps correct responses."""
