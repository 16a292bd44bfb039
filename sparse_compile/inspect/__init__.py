"""What was found and what became of it: reports that only read."""
