"""What lies and runs in environments of others: pins, and programs that know nothing of fedloom."""
