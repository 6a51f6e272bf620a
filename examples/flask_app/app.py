"""The application factory; ``flask --app flask_app.app run`` serves it, ``celery -A flask_app.worker worker`` works."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from flask import Flask

from celery_alchemy import Alchemy
from flask_app.models import db
from flask_app.views import views
from without_servers import celery_settings, database_url


def create_app() -> Flask:
    """Make the web application, with its Celery app in ``extensions["celery"]``."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database_url("flask_app")
    app.config["CELERY"] = celery_settings("flask_app")
    db.init_app(app)
    celery_init_app(app)
    app.register_blueprint(views)
    with app.app_context():
        db.create_all()
        app.extensions["alchemy"].create_tables()
    return app


# <celery_init_app>
def celery_init_app(app: Flask) -> Celery[Any]:
    """As in Flask's documentation, with Alchemy beside it.

    Source: https://flask.palletsprojects.com/en/stable/patterns/celery/
    """

    class FlaskTask(Task):  # type: ignore[type-arg]
        def __call__(self, *args: object, **kwargs: object) -> object:
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app: Celery[Any] = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    with app.app_context():
        app.extensions["alchemy"] = Alchemy(celery_app, db.session, outbox=True)
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


# </celery_init_app>
