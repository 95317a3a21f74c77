"""Several runs that belong together: pipelines, whose steps start from each other, and searches for a recipe's values.

They stand on run folders and on what trains one recipe; nothing of the engine knows of them.
"""
