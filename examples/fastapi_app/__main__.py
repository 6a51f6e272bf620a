"""A worker and the web application with one command: ``python -m fastapi_app``."""

import uvicorn

from fastapi_app.tasks import create_tables
from without_servers import PORT, worker

create_tables()
with worker("fastapi_app.tasks"):
    uvicorn.run("fastapi_app.web:web", port=PORT)
