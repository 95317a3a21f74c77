"""The recipe: its keys, what can be said of its parts without loading them, and how files become one."""
