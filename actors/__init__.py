"""Ray actors: thin shells that put dphrl code on processes and devices."""
