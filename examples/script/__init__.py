"""A script that sends tasks, waits for them, and reads what they wrote."""
