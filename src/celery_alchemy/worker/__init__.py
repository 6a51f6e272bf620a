"""What runs in a worker's parent process: checks at its start, and the ends of lost requests."""
