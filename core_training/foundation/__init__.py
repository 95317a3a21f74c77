"""What every floor above stands on: errors, durable files, background processes, the state that travels."""
