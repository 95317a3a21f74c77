"""The fault matrix: one fault at one point of a round in one component, and what must be true afterwards."""
