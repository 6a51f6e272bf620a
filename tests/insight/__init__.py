"""Tests of what celery-alchemy tells of itself, and of apps with several databases."""
