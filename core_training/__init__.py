"""The engine: one recipe, one model, one data set, trained in slices. Knows nothing of sites, servers or peers."""

__version__ = "0.1.0"
