"""Graders: completions and answers in, typed verdicts out. Mathematics, SQL, and the user's own."""
