"""The cost of secure aggregation, beside a peer's and beside rounds in the clear."""
