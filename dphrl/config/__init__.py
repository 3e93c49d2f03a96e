"""The configuration: its sections, how it is read, and how its errors are told."""
