"""Tests of entities as arguments."""
