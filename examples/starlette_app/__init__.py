"""A shop on Starlette: a middleware gives each request an AsyncSession."""
