"""What a model can be trained for: a class each, which its light file in `core_training.parts.stages` names."""
