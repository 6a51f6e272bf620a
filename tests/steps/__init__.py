"""Steps of long tasks: each is committed once, wherever a run ends."""
