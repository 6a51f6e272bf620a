"""Async tasks: `async def` bodies with an AsyncSession, in one process and in real workers."""
