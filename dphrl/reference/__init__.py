"""The reference stage: sample the initial policy once, split the prompts, keep what it solves."""
