"""Suites: the same task under several algorithms and seeds, and what their runs show together."""
