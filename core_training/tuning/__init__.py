"""The choice of trained parameters. A mode is a file here and a light one in `core_training.parts.tuning_modes`."""
