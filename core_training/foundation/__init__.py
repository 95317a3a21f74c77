"""The floor that all others stand on: errors, durable files, background processes, the state that travels."""
