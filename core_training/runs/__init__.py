"""Run folders: what a run leaves behind, and how a finished one is found. Loads no model."""
