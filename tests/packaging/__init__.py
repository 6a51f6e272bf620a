"""Tests of what is installed: which modules it loads, and what it is typed as."""
