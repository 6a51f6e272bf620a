"""How a worker's app module learns from the test that started it which broker and database to use."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from celery import Celery

SETTINGS_VARIABLE = "CELERY_ALCHEMY_TEST_SETTINGS"
DATABASE_VARIABLE = "CELERY_ALCHEMY_TEST_DATABASE_URL"


def make_app(name: str, **options: Any) -> Celery:
    """Return a Celery app with the settings of the test, for modules that a `Worker` runs.

    In the test's own process, where no settings are handed over, the app has Celery's defaults; the test
    updates `app.conf` itself or sends by name through `broker.client`.
    """
    app = Celery(name, **options)
    app.conf.update(json.loads(os.environ.get(SETTINGS_VARIABLE, "{}")))
    return app


def database_url() -> str | None:
    """Return the URL of the test's database, or None where no worker harness set one."""
    return os.environ.get(DATABASE_VARIABLE)


def environment(settings: Mapping[str, Any], url: str | None) -> dict[str, str]:
    """Return the variables that hand settings and database over to a worker."""
    variables = {SETTINGS_VARIABLE: json.dumps(dict(settings))}
    if url is not None:
        variables[DATABASE_VARIABLE] = url
    return variables
