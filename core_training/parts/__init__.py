"""The parts that a recipe chooses by name: one light file each, with its settings, its facts and where its work is."""
