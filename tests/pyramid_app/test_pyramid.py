"""What a Pyramid request enqueues is sent when its transaction manager has committed, though no row has changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction
import zope.sqlalchemy
from celery import Celery
from pyramid.request import Request
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue, on_commit
from tests.conftest import StartWorker
from tests.pyramid_app.app import Base, add_tasks, make_web, session_of_request, session_of_thread
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

pytestmark = [pytest.mark.databases("sqlite", "postgresql"), pytest.mark.brokers("redis")]


class Site:
    """The web application in the test's process, on the database and broker of the workers."""

    def __init__(self, database: Database, broker: Broker, form: str) -> None:
        self.database = database
        self.app = Celery("pyramid_app", set_as_current=False)
        self.app.conf.update(broker.settings)
        self.alchemy: Alchemy = add_tasks(self.app, database.url)
        Base.metadata.create_all(database.engine)
        self.alchemy.create_tables()
        self.ended: list[str] = []
        of_request = form == "request"
        # The thread's own manager, which registries are joined to, or one for the application.
        self.manager: Any = transaction.TransactionManager(explicit=True) if of_request else transaction.manager
        session_of = (session_of_request if of_request else session_of_thread)(self.alchemy)
        self._web = make_web(self.app, session_of, self.manager, self.ended)

    def post(self, path: str, email: str = "emma@example.org") -> str:
        """Send a request and return the body of its answer."""
        request = Request.blank(path, POST={"email": email})
        return str(request.get_response(self._web).text)

    def mails(self) -> list[str]:
        """Return to whom mails were sent."""
        return [row[0] for row in self.database.rows("SELECT email FROM mails ORDER BY id")]

    def kept(self) -> int:
        """Return how many messages the outbox holds or held back."""
        return int(self.database.rows("SELECT count(*) FROM celery_outbox")[0][0])


@pytest.fixture(params=["request", "thread"])
def site(request: pytest.FixtureRequest, database: Database, broker: Broker) -> Iterator[Site]:
    """The application, with a session for each request and with one for each thread."""
    site = Site(database, broker, request.param)
    yield site
    site.alchemy.engine.dispose()
    site.app.close()


@pytest.mark.parametrize(("path", "answer"), [("/password", "sent"), ("/known", "0"), ("/register", "registered")])
def test_mail_is_sent_by_a_real_worker(site: Site, start_worker: StartWorker, path: str, answer: str) -> None:
    """By a request that has touched no row, has only read, or has written."""
    start_worker("tests.pyramid_app.app", pool="threads")

    assert site.post(path) == answer
    eventually(lambda: site.mails() == ["emma@example.org"], timeout=30, what="the mail is sent")


def test_each_request_sends_its_own(site: Site) -> None:
    """A second request of the same thread begins anew."""
    for number in range(3):
        site.post("/password", f"{number}@example.org")

    assert site.kept() == 3


def test_failing_request_sends_nothing(site: Site) -> None:
    """The manager aborts; what was enqueued is dropped, in this request and for the next one."""
    with pytest.raises(LookupError):
        site.post("/broken")
    site.post("/locked")

    assert site.kept() == 0


def test_lock_is_given_back_when_the_manager_has_ended(site: Site) -> None:
    """Also of a session that nothing else was done with."""
    site.post("/locked")

    assert site.ended == ["locked"]


# --- the join itself -------------------------------------------------------------------------------------------


@pytest.fixture
def joined(site: Site) -> Iterator[Callable[..., Session]]:
    """Make sessions that are joined to a manager of the test's own."""
    sessions: list[Session] = []

    def make(**options: Any) -> Session:
        session = Session(site.alchemy.engine, **options)
        zope.sqlalchemy.register(session, transaction_manager=site.manager)
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("options", [{}, {"twophase": True}], ids=["one phase", "two phases"])
def test_manager_commits_what_waits(site: Site, joined: Callable[..., Session], options: dict[str, Any]) -> None:
    """In one phase, and where several databases are prepared first."""
    ran: list[str] = []
    session = joined(**options)
    with site.manager:
        on_commit(session, lambda: ran.append("x"))
        assert ran == []

    assert ran == ["x"]


def test_savepoint_of_the_manager_takes_its_sends_along(site: Site, joined: Callable[..., Session]) -> None:
    """What was enqueued after it is gone when it is rolled back."""
    if site.database.name == "sqlite":
        pytest.skip("zope.sqlalchemy has no savepoints there")
    ran: list[str] = []
    session = joined()
    with site.manager:
        session.execute(text("SELECT 1"))
        on_commit(session, lambda: ran.append("kept"))
        savepoint = site.manager.savepoint()
        on_commit(session, lambda: ran.append("lost"))
        savepoint.rollback()

    assert ran == ["kept"]


def test_send_that_the_manager_leaves_out_is_reported(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A session that says nothing of its join is closed as one that has changed nothing; the log names the task."""
    remind: Any = site.app.tasks["remind"]
    session = Session(site.alchemy.engine)
    with caplog.at_level(logging.WARNING, "celery_alchemy"), site.manager:
        zope.sqlalchemy.datamanager.join_transaction(session, transaction_manager=site.manager)
        enqueue(session, remind.s("emma@example.org"))

    assert "closed without a commit" in caplog.text
    assert "sending remind" in caplog.text
    assert site.kept() == 0
