"""Pass@k of base and trained model: estimators, the stage that samples and grades, and the table that shows both."""
