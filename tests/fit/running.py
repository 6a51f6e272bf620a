"""Running a plan here: by a worker's tracer, eagerly or directly; all sends are captured."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Reject

from celery_alchemy import enqueue, is_transient
from celery_alchemy.testing import Sent, SentTask, captured
from tests.fit.bodies import send, task_for
from tests.fit.forms import Application, Mark, current
from tests.fit.model import Expected
from tests.fit.plans import Plan

__all__ = ["run"]

#: How a task has ended: its state, and the name of an error that no ending raises by itself.
Ended = tuple[str, "str | None"]

#: How a message was run: the state, and what the task returned or raised.
Delivered = tuple[str, Any]


def run(application: Application, plan: Plan) -> Expected:
    """Run a plan and return what has come of it, in the words of the model."""
    task = task_for(application, plan)
    with captured(application.alchemy) as sent:
        state, error = _within(application, plan, task, sent)
    names = []
    for message in sent:
        assert message.task == "note"
        if message.args[0] != "outer":
            assert message.message.headers.get("tenant") == plan.tenant
        names.append(message.args[0])
    rows, heard = application.places.rows(), list(application.heard)
    return Expected(rows, names, heard, state, application.runs, error)


def _within(application: Application, plan: Plan, task: Any, sent: Sent) -> Ended:
    """Run the task by itself, or inside of a block that has written and has not committed."""
    run_it = _WAYS[plan.way]
    if not plan.within:
        return run_it(application, plan, task, sent)
    with application.alchemy.begin() as session:
        session.add(mark := Mark(name="outer"))
        ended = run_it(application, plan, task, sent)
        assert mark in session.new
        send(application, session, "outer", by="task")
    return ended


def _delivered(application: Application, plan: Plan, task: Any, sent: Sent) -> Ended:
    """Have a worker's tracer run the task, and then the message of its retry."""
    with application.alchemy.begin() as session:
        enqueue(session, task.s().set(headers=_headers(plan)))
    state, value = "", None
    while works := [message for message in sent if message.task == task.name]:
        try:
            state, value = _deliver(sent, works[0])
        except SystemExit:
            return "SystemExit", None
        if plan.once and state != "RETRY":
            _deliver_again(application, sent, works[0], (state, value))
    return state, _library_error(value)


def _deliver(sent: Sent, message: SentTask) -> Delivered:
    """Run a message first, out of its turn."""
    if message in sent:
        sent.remove(message)
    sent.insert(0, message)
    ended = sent.run_next(propagate=False)
    return ended.state, ended.result


def _deliver_again(app: Application, sent: Sent, message: SentTask, ended: Delivered) -> None:
    """See that a second delivery of a once task runs nothing and reports the same."""
    state, value = ended
    runs, notes = app.runs, len(sent)

    again, result = _deliver(sent, message)

    assert again == {"REJECTED": "FAILURE"}.get(state, state)
    assert (app.runs, len(sent)) == (runs, notes)
    if state == "SUCCESS":
        assert result == value


def _eager(application: Application, plan: Plan, task: Any, sent: Sent) -> Ended:
    """Run the task by ``apply()``, as a test or a web request does; a retry is run there too."""
    try:
        ended = task.apply(headers=_headers(plan))
    except SystemExit:
        return "SystemExit", None
    return ended.state, _library_error(ended.result)


def _direct(application: Application, plan: Plan, task: Any, sent: Sent) -> Ended:
    """Call the task as a function; who it is for is known from the context."""
    token = current.set(plan.tenant)
    try:
        task()
    except Ignore:
        return "IGNORED", None
    except Reject:
        return "REJECTED", None
    except SystemExit:
        return "SystemExit", None
    except Exception as exc:  # noqa: BLE001 - whatever it is, the model knows it.
        return "FAILURE", _library_error(exc)
    finally:
        current.reset(token)
    return "SUCCESS", None


_WAYS = {"delivered": _delivered, "eager": _eager, "direct": _direct}


def _headers(plan: Plan) -> dict[str, Any]:
    return {} if plan.tenant is None else {"tenant": plan.tenant}


def _library_error(value: Any) -> str | None:
    """Return the name of an error that no ending of a plan raises by itself."""
    if isinstance(value, BaseException) and is_transient(value):
        return "transient"
    names = ("LookupError", "IntegrityError", "SoftTimeLimitExceeded", "Ignore", "Reject", "Retry")
    name = type(value).__name__
    return name if isinstance(value, BaseException) and name not in names else None
