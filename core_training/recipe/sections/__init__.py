"""The sections of a recipe, a file each: keys, types, defaults, meanings, and what within one goes together."""
