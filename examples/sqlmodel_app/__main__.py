"""A worker and the web application with one command: ``python -m sqlmodel_app``."""

import uvicorn

from sqlmodel_app.tasks import create_tables
from without_servers import PORT, worker

create_tables()
with worker("sqlmodel_app.tasks"):
    uvicorn.run("sqlmodel_app.web:web", port=PORT)
