"""Crash points: at every named moment of a message's life something dies, and the accounts must add up."""
