"""From a model that knows nothing to one that answers as people wish, in steps: `pipeline.yaml`."""
