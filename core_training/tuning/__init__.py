"""Which parameters are trained. A tuning mode is a file here and a light one in `core_training.parts.tuning_modes`."""
