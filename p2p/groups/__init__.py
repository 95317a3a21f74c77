"""Averaging in groups that learn the sum of their updates and none by itself: who is called, and what is exchanged."""
