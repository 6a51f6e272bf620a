"""The table of messages: where it is, how they are written to it and handed over, and the relay."""
