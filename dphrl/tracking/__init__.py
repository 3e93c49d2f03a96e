"""What a run reports: metrics on disk and elsewhere, the console, the log."""
