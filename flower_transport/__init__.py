"""All contact with Flower: the rest of fedloom sees a grid of four methods, and apps that answer envelopes."""
