"""What needs a GPU, as one script: `python -m tests.gpu` runs every part that the machine can and prints one table."""
