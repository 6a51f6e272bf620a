"""Tests of the database as the broker."""
