"""Sending on commit, the outbox, the relay and `once` tasks: nothing is lost, nothing is doubled."""
