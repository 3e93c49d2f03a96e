"""What a user starts: the command line, placement and launch."""
