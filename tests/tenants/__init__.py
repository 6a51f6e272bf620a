"""Tenants of one application: each task works for one of them, and never for another."""
