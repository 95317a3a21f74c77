"""Records, read and turned into a stage's values, examples and rows."""
