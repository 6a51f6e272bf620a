"""The application: views that send, and the tasks that a real worker runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zope.sqlalchemy
from celery import Celery
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from celery_alchemy import Alchemy, enqueue, on_end
from tests.settings import database_url, make_app


class Base(DeclarativeBase):
    """The tables."""


class User(Base):
    """Somebody who has forgotten the password."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100))


class Mail(Base):
    """A mail that was sent."""

    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100))


def add_tasks(app: Celery, url: str) -> Alchemy:
    """Give a Celery app its Alchemy and its tasks, whose sessions have no transaction manager."""
    alchemy = Alchemy(app, url, outbox=True)
    decorate: Any = app.task

    @decorate(name="remind", once=True, shared=False)
    def remind(session: Session, email: str) -> None:
        session.add(Mail(email=email))

    @decorate(name="welcome", shared=False)
    def welcome(session: Session, user_id: int) -> None:
        session.add(Mail(email=session.get_one(User, user_id).email))

    return alchemy


SessionOf = Callable[[Request], Any]


def session_of_request(alchemy: Alchemy) -> SessionOf:
    """Return what Pyramid's cookiecutter does: a session for each request, joined to its manager."""
    maker = sessionmaker(alchemy.engine)

    def session_of(request: Request) -> Session:
        session = maker()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    return session_of


def session_of_thread(alchemy: Alchemy) -> SessionOf:
    """Return what older applications have: one registry, joined to the thread's manager."""
    registry = scoped_session(sessionmaker(alchemy.engine))
    zope.sqlalchemy.register(registry)
    return lambda request: registry


class Views:
    """The views of the application.

    Args:
        app: The Celery app.
        ended: What is told of each transaction that has ended.
    """

    def __init__(self, app: Celery, ended: list[str]) -> None:
        self._remind: Any = app.tasks["remind"]
        self._welcome: Any = app.tasks["welcome"]
        self._ended = ended

    def password(self, request: Request) -> Response:
        """Send a mail, and touch no row."""
        enqueue(request.dbsession, self._remind.s(request.params["email"]))
        return Response("sent")

    def known(self, request: Request) -> Response:
        """Send a mail after a look into the database."""
        count = len(request.dbsession.scalars(select(User)).all())
        enqueue(request.dbsession, self._remind.s(request.params["email"]))
        return Response(str(count))

    def register(self, request: Request) -> Response:
        """Make a row, and send what will look for it."""
        user = User(email=request.params["email"])
        request.dbsession.add(user)
        request.dbsession.flush()
        enqueue(request.dbsession, self._welcome.s(user.id))
        return Response("registered")

    def broken(self, request: Request) -> Response:
        """Send, and fail."""
        enqueue(request.dbsession, self._remind.s(request.params["email"]))
        raise LookupError

    def locked(self, request: Request) -> Response:
        """Hold something until the transaction has ended, and touch nothing."""
        on_end(request.dbsession, lambda: self._ended.append("locked"))
        return Response("locked")


def make_web(app: Celery, session_of: SessionOf, manager: Any, ended: list[str]) -> Any:
    """Return the WSGI application."""
    config = Configurator(settings={"tm.manager_hook": lambda request: manager})
    config.include("pyramid_tm")
    config.add_request_method(session_of, "dbsession", reify=True)
    views = Views(app, ended)
    for name in ("password", "known", "register", "broken", "locked"):
        config.add_route(name, f"/{name}")
        config.add_view(getattr(views, name), route_name=name)
    return config.make_wsgi_app()


app = make_app("pyramid_app")
if (url := database_url()) is not None:
    alchemy = add_tasks(app, url)
