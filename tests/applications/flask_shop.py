"""Flask-SQLAlchemy as in the documentation of Flask: a factory, a FlaskTask and shared tasks."""

from __future__ import annotations

from celery import Celery, Task
from flask import Flask

from celery_alchemy import Alchemy
from tests.applications import flask_tasks
from tests.applications.flask_models import db
from tests.settings import database_url, make_app


def create_app() -> Flask:
    """Make Flask's app, with Celery's in its extensions."""
    flask_app = Flask("flask_shop")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = database_url() or "sqlite://"
    db.init_app(flask_app)
    celery_init_app(flask_app)
    return flask_app


def celery_init_app(flask_app: Flask) -> Celery:
    """As in Flask's documentation, with Alchemy beside it."""

    class FlaskTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with flask_app.app_context():
                return self.run(*args, **kwargs)

    celery_app = make_app("flask_shop", task_cls=FlaskTask)
    with flask_app.app_context():
        alchemy = Alchemy(celery_app, db.session, outbox=True)
        assert alchemy.engine is db.engine
    celery_app.set_default()
    flask_app.extensions["celery"] = celery_app
    return celery_app


assert flask_tasks.shared
app = create_app().extensions["celery"]
