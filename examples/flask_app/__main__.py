"""A worker and the web application with one command: ``python -m flask_app``."""

from flask_app.app import create_app
from without_servers import PORT, worker

app = create_app()
with worker("flask_app.worker"):
    app.run(port=PORT)
