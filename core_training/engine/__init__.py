"""The engine: one model, one stage and one data set, trained in slices."""
