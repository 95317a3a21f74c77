"""The engine by itself, and beside TRL."""
