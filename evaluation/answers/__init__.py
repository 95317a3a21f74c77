"""What models answer: loading, scoring, writing, judging, and keeping it."""
