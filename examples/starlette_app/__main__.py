"""A worker and the web application with one command: ``python -m starlette_app``."""

import uvicorn

from starlette_app.tasks import create_tables
from without_servers import PORT, worker

create_tables()
with worker("starlette_app.tasks"):
    uvicorn.run("starlette_app.web:web", port=PORT)
