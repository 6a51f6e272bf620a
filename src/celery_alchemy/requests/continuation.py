"""What comes after a ``once`` task, sent by its own commit: callbacks and the rest of its chain.

Beneath ``once.py``. The record of a completion says which they were: a delivery of the same message
drops those, and Celery's tracer sends any others, of a task that was sent again with the same id.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence

from celery.app.task import Context
from sqlalchemy.orm import Session

from ..messages.celery_types import Fields, signed
from ..messages.recording import recording
from .plan import Plan
from .sending import hold

__all__ = ["drop_held", "held_ids", "hold_continuation"]

#: Bytes of what a record keeps of each: enough to tell those of one task from those of another.
_DIGEST_BYTES = 9


def hold_continuation(plan: Plan, request: Context, session: Session, value: object) -> None:
    """Send the callbacks and the next link of a chain from a session's transaction.

    Celery's tracer finds nothing left to send.

    The tracer sends them after the commit: a crash in between, or a broker that loses them,
    would end the chain. Source: ``_dispatch_callbacks_and_chain`` in ``celery.app.trace``.
    """
    home, app = plan.required_home, plan.app
    chain = _chain_of(request)
    if not (request.callbacks or chain) or not _keeps(plan, request):
        return
    options: Fields = {
        "parent_id": request.id,
        "root_id": request.root_id or request.id,
    }
    if app.conf.task_inherit_parent_priority:
        options["priority"] = (request.delivery_info or {}).get("priority")
    with recording(app) as messages:
        for callback in request.callbacks or ():
            signed(callback, app).apply_async((value,), **options)
        if chain:
            signed(chain[-1], app).apply_async((value,), chain=chain[:-1], **options)
    hold(app, home, session, messages, chosen_id=True)


def held_ids(plan: Plan, request: Context) -> list[str]:
    """Return what tells the signatures that ``hold_continuation()`` sends for a request."""
    return [_id_of(one, request) for one in _next_of(request)] if _keeps(plan, request) else []


def drop_held(request: Context, held: Collection[str]) -> None:
    """Leave none of a request's callbacks and chain to the tracer that were sent by a commit."""
    if not held:
        return
    if request.callbacks:
        left = [one for one in request.callbacks if _id_of(one, request) not in held]
        request.callbacks = left or None
    chain = _chain_of(request)
    if chain and _id_of(chain[-1], request) in held:
        request.chain = None


def _keeps(plan: Plan, request: Context) -> bool:
    return not request.is_eager and plan.required_home.outbox is not None


def _chain_of(request: Context) -> Sequence[Fields] | None:
    # Its stub does not know that a chain is a list of dicts.
    chain: Sequence[Fields] | None = request.get("chain")
    return chain


def _next_of(request: Context) -> Iterator[Mapping[str, object]]:
    yield from request.callbacks or ()
    chain = _chain_of(request)
    if chain:
        yield chain[-1]


def _id_of(signature: Mapping[str, object], request: Context) -> str:
    """Tell a signature by the id of its task; one without an id by all that it says, and to whom.

    Another task with the same key may have callbacks that say the same.
    """
    options = signature.get("options")
    task_id = options.get("task_id") if isinstance(options, Mapping) else None
    said = task_id or f"{request.id} {json.dumps(signature, sort_keys=True, default=str)}"
    return b64encode(hashlib.sha256(str(said).encode()).digest()[:_DIGEST_BYTES]).decode("ascii")
