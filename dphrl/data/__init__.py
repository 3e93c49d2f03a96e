"""From files to tokenized prompts: problems of every kind, chat templates, the schedule of a run."""
