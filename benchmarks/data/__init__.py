"""How fast records become tokens."""
