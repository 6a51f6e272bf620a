"""Flask-SQLAlchemy with a Celery subclass of its own, which gives its tasks an application context."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery
from flask import Flask

from celery_alchemy import Alchemy
from tests.applications import flask_tasks
from tests.applications.flask_models import db
from tests.settings import SETTINGS_VARIABLE, database_url


class FlaskCelery(Celery):
    """As it is handed on from application to application since Flask 0.10."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patch_task()

    def patch_task(self) -> None:
        """Run each task in an application context."""
        base: Any = self.Task
        celery_app: Any = self

        class ContextTask(base):  # type: ignore[misc]
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                with celery_app.flask_app.app_context():
                    return base.__call__(self, *args, **kwargs)

        self.Task = ContextTask  # type: ignore[method-assign, assignment]

    def init_app(self, flask_app: Flask) -> None:
        """Take the settings of Flask's app."""
        self.flask_app = flask_app
        self.conf.update(flask_app.config["CELERY"])


flask_app = Flask("subclass_shop")
flask_app.config["SQLALCHEMY_DATABASE_URI"] = database_url() or "sqlite://"
flask_app.config["CELERY"] = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
db.init_app(flask_app)
app = FlaskCelery("subclass_shop")
app.init_app(flask_app)
with flask_app.app_context():
    alchemy = Alchemy(app, db.session, outbox=True)
    assert alchemy.engine is db.engine
assert flask_tasks.shared
