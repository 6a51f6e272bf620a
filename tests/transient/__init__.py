"""Transient errors: provoked on real databases, recognised, and run again."""
