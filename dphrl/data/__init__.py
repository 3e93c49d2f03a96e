"""Makes tokenized prompts from files: problems of every kind, chat templates, the schedule of a run."""
