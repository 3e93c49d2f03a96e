"""What a user starts: the command line, placement and launch."""

__part_of__ = "dphrl"
