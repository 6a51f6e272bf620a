"""How long a broker waits for an acknowledgement before it delivers a message again.

This says also what that means for ``once`` tasks.

Underneath the worker's start (``worker/boot_steps.py``) and the checks before it
(``operations/check.py``).
"""

from __future__ import annotations

from .celery_types import App

__all__ = ["visibility_timeout_seconds", "window_is_short"]


def visibility_timeout_seconds(app: App) -> float | None:
    """Return after how many seconds the app's broker delivers again: Redis and SQS do.

    None for one that does not.

    Source: ``visibility_timeout`` and ``default_visibility_timeout`` of the Channel classes in
    ``kombu.transport``.
    """
    with app.connection_for_read() as connection:
        channel = getattr(connection.get_transport_cls(), "Channel", None)
        options = connection.transport_options or {}
    # On the class of SQS's channels the first is a property, which looks into the options.
    defaults = (
        getattr(channel, name, None)
        for name in ("visibility_timeout", "default_visibility_timeout")
    )
    timeouts = [options.get("visibility_timeout"), *defaults]
    return next((float(timeout) for timeout in timeouts if isinstance(timeout, (int, float))), None)


def window_is_short(app: App, once_window_seconds: float) -> float | None:
    """Return the broker's visibility timeout if completion records are gone before it is over.

    The broker could then deliver a task again whose record is gone, and its work would be done
    twice.
    """
    if not any(getattr(task, "is_once", False) for task in app.tasks.values()):
        return None
    timeout = visibility_timeout_seconds(app)
    return timeout if timeout is not None and once_window_seconds < timeout else None
