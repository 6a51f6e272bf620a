"""What a task's body asks for: sessions, entities, options, and the outcomes that commit."""
