"""The layouts of each kind of data, best first: one file a kind."""
