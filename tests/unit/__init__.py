"""Each part of a task's session by itself, in the test's own process."""
