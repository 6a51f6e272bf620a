"""A shop on FastAPI: orders come in by HTTP, a worker charges them."""
