"""Deliberate one-line errors in the core, and the tests that have to notice each: `make mutants`."""
