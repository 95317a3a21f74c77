"""fedloom from Python: short programs, each runnable as it stands with a base model and records of your own."""
