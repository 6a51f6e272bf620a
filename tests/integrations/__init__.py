"""Tests of the optional integrations, with the real packages."""
