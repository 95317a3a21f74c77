"""Records, read and turned into the tokenised rows that a stage trains on."""
