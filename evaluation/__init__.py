"""Judging results: tasks, metrics, statistics, gates. It stands on runs, data and models; they know nothing of it."""
