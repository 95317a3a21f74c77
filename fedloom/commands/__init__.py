"""One module a command: it parses, calls the room that does the work, and prints. Heavy imports wait inside."""
