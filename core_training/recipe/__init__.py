"""The recipe: its keys, and how files become one."""
