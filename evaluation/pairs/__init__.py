"""Which of two answers is better: contests, judges, ratings, and the page on which people judge."""
