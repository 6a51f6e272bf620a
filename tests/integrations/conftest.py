"""Fixtures of the tests of integrations."""

from __future__ import annotations

from tests.unit.conftest import make_shop, shop

__all__ = ["make_shop", "shop"]
