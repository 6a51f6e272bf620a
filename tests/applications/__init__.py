"""Small applications as people have them, each with a session of its own, run by real workers."""
