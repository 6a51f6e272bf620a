"""Tests of the testing kit, which use it as a user would."""
