"""What a federation adds to training: time, memory, traffic."""
