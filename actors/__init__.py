"""Ray actors: thin shells that run dphrl code on processes and devices."""

__part_of__ = "dphrl"
