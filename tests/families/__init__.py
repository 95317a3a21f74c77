"""Language models of every family that transformers has, each a few thousand weights, and what they are asked."""
