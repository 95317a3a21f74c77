"""What is asked: files and task files read as items."""
