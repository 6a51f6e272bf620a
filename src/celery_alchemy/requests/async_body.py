"""Running the body of an ``async def`` task.

It is the path of ``sync_body.py``, in a greenlet of an event loop.

SQLAlchemy lets sync code use an async driver there, so that all rules are written once; at the
leaf of the path the coroutine is awaited.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable

from celery.app.task import Context
from sqlalchemy.util import await_only

from ..signatures.injection import Injection
from .arguments import sessions_in_scope
from .event_loop import carry, process_loop
from .loop_call import LoopCall
from .once_body import refuse_items
from .plan import Planned
from .sync_body import in_unit_of_work

__all__ = ["in_async_unit_of_work", "in_own_loop"]


def in_async_unit_of_work(
    task: Planned, body: Callable[..., object], injection: Injection
) -> Callable[..., object]:
    """Wrap a coroutine function so that Celery can call it and each call is one unit of work."""

    @functools.wraps(body)
    def leaf(*args: object, **kwargs: object) -> object:
        made = body(*args, **kwargs)
        # A decorator may answer by itself, without the coroutine.
        return await_only(made) if inspect.isawaitable(made) else made

    in_greenlet = in_unit_of_work(task, leaf, injection, is_async=True)

    # Celery, and inspect.iscoroutinefunction(), must see the function that it is: wraps() would
    # pass on the mark of a coroutine.
    @functools.wraps(body)
    def run(*args: object, **kwargs: object) -> object:
        plan = task.session_plan
        top: Context | None = plan.task.request_stack.top
        request = Context() if top is None else top
        if not injection.is_given(kwargs):
            refuse_items(plan, request)
        # Here, in the caller's scope.
        kwargs = dict(sessions_in_scope(injection, kwargs))
        is_awaited = bool(request.called_directly) and not request.is_eager and _in_a_loop()
        filled = functools.partial(in_greenlet, *args, **kwargs)
        carried = functools.partial(carry, LoopCall(request, is_awaited), filled)
        # What a coroutine awaits runs in the coroutine's own loop, with that loop's engine.
        return carried() if is_awaited else process_loop.run(carried)

    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def in_own_loop(
    task: Planned, body: Callable[..., object], injection: Injection
) -> Callable[..., object]:
    """Wrap a coroutine function under a decorator that runs it: a plain body.

    What is a coroutine all the same is run in the loop of the process.
    """

    @functools.wraps(body)
    def plain(*args: object, **kwargs: object) -> object:
        made = body(*args, **kwargs)
        return process_loop.run(lambda: made) if inspect.isawaitable(made) else made

    return in_unit_of_work(task, plain, injection)


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
