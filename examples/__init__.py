"""Programs and recipes that show fedloom at work; run them from the repository's root."""
