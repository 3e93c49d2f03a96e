"""Runs what a model wrote, in child processes that can be killed and in a read-only SQLite."""
