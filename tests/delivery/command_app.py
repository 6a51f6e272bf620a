"""The app that the command line's tests name with `celery -A`."""

from __future__ import annotations

from celery_alchemy import Alchemy
from tests.delivery.outbox_stand import add_effect
from tests.settings import database_url, make_app

app = make_app("commands")
alchemy = Alchemy(app, database_url(), outbox=True)
effect = app.task(name="effect")(add_effect)
