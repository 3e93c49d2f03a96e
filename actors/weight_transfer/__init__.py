"""How new weights go from the learner to the engines: the source, the backends, the session, the record of it."""
