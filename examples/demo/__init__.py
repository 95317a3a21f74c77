"""Three invented hospitals, one small model, four ways of training: `python -m examples.demo`."""
