"""What a model can be trained for: a file each, and a line in `core_training.parts`."""
