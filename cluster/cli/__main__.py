"""`python -m cluster.cli` is the program `dphrl` too."""

from cluster.cli import main

main()
