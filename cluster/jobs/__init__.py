"""Runs as jobs of a Ray cluster: what is submitted and uploaded, the client of Ray Jobs, and how far jobs are."""
