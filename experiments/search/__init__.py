"""Searches for the values of a recipe's keys: what is searched, how it is sampled, pruned, resumed and confirmed."""
