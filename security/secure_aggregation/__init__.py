"""Secure aggregation: whoever adds the updates up learns their sum and nothing else. State machines without I/O."""
