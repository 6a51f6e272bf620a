"""Tests of what README.md and docs/ say."""
