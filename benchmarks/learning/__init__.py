"""What is learned: held-out losses on real data."""
