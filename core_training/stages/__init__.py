"""The stages of training: a class each, which its light file in `core_training.parts.stages` names."""
