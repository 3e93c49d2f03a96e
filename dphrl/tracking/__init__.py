"""What a run tells: metrics on disk and elsewhere, the console, the log."""
