"""The fixtures as a user's tests meet them, and a real worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SHOP = """
import os
from celery import Celery
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from celery_alchemy import Alchemy

folder = os.path.dirname(os.path.abspath(__file__))
app = Celery("shop", broker="filesystem://", backend=f"file://{folder}")
app.conf.broker_transport_options = dict.fromkeys(("data_folder_in", "data_folder_out", "control_folder"), folder + "/broker")
os.makedirs(folder + "/broker", exist_ok=True)
alchemy = Alchemy(app, f"sqlite:///{folder}/shop.db", outbox=True, redeliver_after=1, relay_interval_seconds=0.1)
app.conf.worker_lost_wait = 0.2

class Base(DeclarativeBase): ...

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]

@app.task(once=True)
def charge(session: Session, name: str) -> str:
    session.add(Order(name=name))
    return name

Base.metadata.create_all(alchemy.engine)
alchemy.create_tables()
"""
CONFTEST = """
import pytest, shop

@pytest.fixture
def alchemy():
    return shop.alchemy
"""


@pytest.fixture
def shop(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with an application and a conftest.py."""
    pytester.makepyfile(shop=SHOP)
    pytester.makeconftest(CONFTEST)
    pytester.syspathinsert()
    return pytester


def _run(tests: pytest.Pytester, code: str) -> pytest.RunResult:
    tests.makepyfile(test_shop=code)
    # A process of its own: the application's module must not stay in this one.
    return tests.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest")


def test_fixtures_work_in_a_users_tests(shop: pytest.Pytester) -> None:
    """Each fixture does what it says, and nothing of one test is left for the next."""
    result = _run(
        shop,
        """
        import pytest
        from shop import Order, charge

        pytestmark = pytest.mark.usefixtures("no_leaks")

        @pytest.mark.parametrize("turn", [1, 2])
        def test_charge(turn, alchemy_session, sent, crash_at, deliver_twice):
            charge.delay("a")
            assert sent == [charge.s("a")]
            with crash_at("COMMIT, after"), deliver_twice():
                sent.run()
            assert [order.name for order in alchemy_session.query(Order)] == ["a"]

        def test_async_session(alchemy_async_session):
            assert alchemy_async_session.sync_session is not None

        def test_difference_is_shown(sent):
            charge.delay("a")
            assert sent == [charge.s("b")]
        """,
    )

    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*At index 0 diff: shop.charge('a') != shop.charge('b')*"])


def test_missing_alchemy_fixture_says_how_to_define_it(pytester: pytest.Pytester) -> None:
    """A user who has just installed the package learns what to do."""
    result = _run(pytester, "def test_sent(sent): ...")

    result.stdout.fnmatch_lines(["*Define in conftest.py:*", "*def alchemy():*"])


def test_leak_fails_the_test_that_leaked(shop: pytest.Pytester) -> None:
    """The place in the test is in the report."""
    result = _run(
        shop,
        """
        from sqlalchemy import text

        def test_leak(no_leaks, alchemy):
            global session
            session = alchemy.source.session()
            session.execute(text("SELECT 1"))
        """,
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*a session with an open transaction, begun at *test_shop.py:6 in test_leak*"])


def test_real_worker_is_killed_at_the_point(shop: pytest.Pytester) -> None:
    """The fault travels to the worker's child, which dies of SIGKILL; the task is delivered again and takes effect once."""
    result = _run(
        shop,
        """
        from sqlalchemy import select
        from shop import Order, charge

        def test_charge(alchemy, worker_process, crash_at):
            worker = worker_process("shop")
            with crash_at("COMMIT, after", task=charge) as crash:
                with alchemy.begin() as session:
                    result = charge.apply_async_on_commit(("a",), session=session)
                assert result.get(timeout=30) == "a"
                assert crash.struck
            assert "signal 9 (SIGKILL)" in worker.log
            with alchemy.session() as session:
                assert session.scalars(select(Order.name)).all() == ["a"]
        """,
    )

    result.assert_outcomes(passed=1)


def test_real_worker_that_dies_behind_its_result_has_struck(shop: pytest.Pytester) -> None:
    """The result is there before the message is acknowledged: the end of the block waits a moment for the point."""
    result = _run(
        shop,
        """
        import pytest
        from celery_alchemy.testing import PointNotReachedError
        from shop import charge

        @pytest.mark.parametrize("point", ["acknowledge, before", "result, after"])
        def test_charge(alchemy, worker_process, crash_at, point):
            worker_process("shop")
            with crash_at(point, task=charge) as crash:
                with alchemy.begin() as session:
                    result = charge.apply_async_on_commit(("a",), session=session)
                assert result.get(timeout=30) == "a"
            assert crash.struck

        def test_point_that_is_not_reached(alchemy, worker_process, crash_at):
            worker_process("shop")
            with pytest.raises(PointNotReachedError), crash_at("step nothing"):
                assert charge.delay("b").get(timeout=30) == "b"
        """,
    )

    result.assert_outcomes(passed=3)


def test_worker_in_a_thread_joins_the_tests_transaction(shop: pytest.Pytester) -> None:
    """celery.contrib.pytest's celery_worker runs tasks in joined sessions; a task that was delivered twice took effect once."""
    result = _run(
        shop,
        """
        import time

        import pytest
        from celery.signals import task_postrun
        from shop import Order, app, charge

        pytest_plugins = ["celery.contrib.pytest"]
        ended = []
        task_postrun.connect(lambda **more: ended.append(more["state"]), weak=False)

        @pytest.fixture
        def celery_app():
            return app

        @pytest.fixture
        def celery_worker_parameters():
            return {"perform_ping_check": False}

        def test_charge(alchemy, alchemy_session, celery_worker, deliver_twice):
            with deliver_twice():
                assert charge.delay("a").get(timeout=60) == "a"
            deadline = time.monotonic() + 60
            while len(ended) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)  # one connection serves one session at a time
            assert ended == ["SUCCESS", "SUCCESS"]
            assert [order.name for order in alchemy_session.query(Order)] == ["a"]

        def test_nothing_is_left(alchemy):
            with alchemy.session() as session:
                assert session.query(Order).all() == []
        """,
    )

    result.assert_outcomes(passed=2)


def test_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Its log is in the error."""
    code = (
        "from pathlib import Path\nfrom celery_alchemy.testing import WorkerProcess\n"
        f"WorkerProcess('no_such_module', Path({str(tmp_path)!r})).start()"
    )

    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    assert "RuntimeError: The worker did not become ready" in finished.stderr
    assert "no_such_module" in finished.stderr


def test_package_does_not_need_pytest() -> None:
    """The kit without its plugin serves any test runner."""
    code = "import sys; sys.modules['pytest'] = None; import celery_alchemy.testing"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
