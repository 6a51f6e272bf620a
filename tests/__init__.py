"""The tests of celery-alchemy, a package so that the workers they start can import the same helpers."""
