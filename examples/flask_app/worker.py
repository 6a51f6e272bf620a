"""What ``celery -A flask_app.worker`` loads."""

from flask_app.app import create_app

app = create_app().extensions["celery"]
