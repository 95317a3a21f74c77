"""All contact with Flower: the rest of fedloom sees a grid of three methods, and apps that answer envelopes."""
