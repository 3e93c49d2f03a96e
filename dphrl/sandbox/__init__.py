"""Where what a model wrote is run: child processes that can be killed, and a read-only SQLite."""
