"""What the three tenant applications share: who the tenant is, on its way with each message, and tasks that work for it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from celery import Celery
from celery.signals import before_task_publish, task_postrun, task_prerun, worker_init
from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import released

#: The tenant of what runs here: set around each task, and by a web application for each request.
current: ContextVar[str | None] = ContextVar("tenant", default=None)


def _send_tenant_along(headers: dict[str, Any], **_: Any) -> None:
    if current.get() is not None:
        headers.setdefault("tenant", current.get())


def _enter_tenant(task: Any, **_: Any) -> None:
    # Celery sends the next link of a chain, and what else follows, when `around` was left.
    task.request.tenant_before = current.set(_named(task))


def _leave_tenant(task: Any, **_: Any) -> None:
    current.reset(task.request.tenant_before)


RECEIVERS = ((before_task_publish, _send_tenant_along), (task_prerun, _enter_tenant), (task_postrun, _leave_tenant))


@worker_init.connect
def begin_travel(**_: Any) -> None:
    """Have the tenant go with each message of this process: a worker, or the one of a test."""
    for signal, receiver in RECEIVERS:
        signal.connect(receiver)


def end_travel() -> None:
    """Take it back, for the other tests of this process."""
    for signal, receiver in RECEIVERS:
        signal.disconnect(receiver)


def _named(task: Any) -> Any:
    # A call in this process has no message: it is for the tenant of its caller.
    return (task.request.headers or {}).get("tenant") or current.get()


def tenant_of(task: Any) -> str:
    """Return the tenant that a request is for; an error for a task that was sent without one."""
    tenant = _named(task)
    if not isinstance(tenant, str) or not tenant.isidentifier():
        raise LookupError(f"task {task.name} was sent without a tenant")
    return tenant


def make_models(**columns: Any) -> tuple[type[DeclarativeBase], type[Any], type[Any]]:
    """Return a base, orders and notes of a tenant.

    Args:
        columns: What each table has besides.
    """

    class Base(DeclarativeBase):
        pass

    def table(name: str) -> dict[str, Any]:
        return {"__tablename__": name, **{key: make() for key, make in columns.items()}}

    order: dict[str, Any] = {"id": mapped_column(primary_key=True), "title": mapped_column(String(100))}
    note: dict[str, Any] = {"id": mapped_column(primary_key=True), "text": mapped_column(String(200))}
    types = {"id": Mapped[int], "title": Mapped[str], "text": Mapped[str]}
    of_order = {"__annotations__": {key: types[key] for key in order}, **order, **table("orders")}
    of_note = {"__annotations__": {key: types[key] for key in note}, **note, **table("notes")}
    return Base, type("Order", (Base,), of_order), type("Note", (Base,), of_note)


def add_tasks(app: Celery, order_class: type[Any], note_class: type[Any]) -> None:
    """Give an app its tasks; each writes down in notes what it saw."""

    def failed(session: Session, exc: BaseException, order: Any) -> None:
        session.add(note_class(text=f"failed: {type(exc).__name__}"))

    def ship(order: Any, session: Session) -> str:
        """Write for the order's tenant, and have another task do the same."""
        session.add(note_class(text=f"ship {order.title}"))
        app.tasks["count"].delay_on_commit()
        return str(order.title)

    def count(session: Session) -> int:
        """Count the tenant's notes, also in a second transaction."""
        first = session.scalar(select(func.count()).select_from(note_class))
        with released(session):
            pass
        session.add(note_class(text=f"count {first}"))
        session.flush()
        return int(session.scalar(select(func.count()).select_from(note_class)) or 0)

    def fail(order: Any, session: Session) -> None:
        """Write and fail."""
        session.add(note_class(text="never"))
        session.flush()
        raise LookupError

    ship.__annotations__["order"] = fail.__annotations__["order"] = order_class
    options: dict[str, Any] = {"shared": False, "once": True}
    app.task(name="ship", **options)(ship)
    app.task(name="count", **options)(count)
    app.task(name="fail", record_failure=failed, **options)(fail)
