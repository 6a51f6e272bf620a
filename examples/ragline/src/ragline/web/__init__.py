"""The web page and its API: FastAPI routes of a few lines over the use cases. Needs the extra `web`."""
