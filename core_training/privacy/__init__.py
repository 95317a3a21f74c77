"""Differential privacy: what a run releases about each unit, what that comes to, and the account of a site."""
