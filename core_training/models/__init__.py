"""Models: loaded, given heads and earlier runs, read and written as states, exported and talked to."""
