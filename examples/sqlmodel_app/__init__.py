"""A shop on FastAPI and SQLModel: tasks have SQLModel's own session."""
