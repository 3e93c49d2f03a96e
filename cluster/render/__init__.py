"""Files that start a run elsewhere: Kubernetes, Slurm, Docker Compose. Text in, text out."""
