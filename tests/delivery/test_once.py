"""The writes of a `once` task are committed once over any number of deliveries, and each delivery reports the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from threading import Thread
from typing import Any
from uuid import UUID

import pytest
from celery import chain, chord, group
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, MissingTableError, OnceCommitError, OnceKeyError, SessionTask, enqueue, released
from celery_alchemy.sessions.engine import WorkerPool, set_worker_pool, worker_pool
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Sent


def start(stand: OutboxStand, task: Any, *args: Any, **options: Any) -> Sent:
    """Send a task from a transaction of its own and take its message out of the broker."""
    with stand.alchemy.begin():
        task.apply_async_on_commit(args, **options)
    [sent] = stand.sent()
    return sent


def start_past_outbox(stand: OutboxStand, task: Any, *args: Any, **options: Any) -> Sent:
    """Send a task as code that knows nothing of the library does."""
    task.apply_async(args, **options)
    [sent] = stand.sent()
    return sent


Start = Callable[..., Sent]
WAYS = pytest.mark.parametrize(
    "begin", [pytest.param(start, id="through the outbox"), pytest.param(start_past_outbox, id="past the outbox")]
)


def count(stand: OutboxStand, **options: Any) -> Any:
    """Make a once task whose result says which effect was its own."""

    @stand.task(**{"name": "count", "once": True, **options})
    def count_effects(session: Session, name: str) -> int:
        effect = Effect(name=name[:100])
        session.add(effect)
        session.flush()
        return effect.id

    return count_effects


@WAYS
def test_many_deliveries_are_one_effect_and_one_result(stand: OutboxStand, begin: Start) -> None:
    """Also when it came past the outbox, and when the copies say that they are redelivered."""
    sent = begin(stand, count(stand), "a")

    ended = [stand.deliver(sent) for _ in range(3)]
    ended.append(stand.deliver(sent, delivery_info={"redelivered": True}))

    assert [(one.state, one.value) for one in ended] == [("SUCCESS", ended[0].value)] * 4
    assert stand.effects() == ["a"]
    assert stand.outbox("completed_at IS NOT NULL, due_at IS NULL, body IS NULL") == [(True, True, True)]


def test_crash_before_the_commit_leaves_the_work_to_the_next_delivery(stand: OutboxStand) -> None:
    """Nothing of the run that died is committed, and its task is still owed."""
    dies = [True]

    @stand.task(name="dies", once=True)
    def dies_once(session: Session) -> str:
        session.add(Effect(name="a"))
        session.flush()
        stand.effect.delay_on_commit("child")
        if dies.pop() if dies else False:
            raise KeyboardInterrupt
        return "done"

    sent = start(stand, dies_once)
    with pytest.raises(KeyboardInterrupt):
        stand.deliver(sent)
    after_crash = (stand.effects(), stand.sent(), stand.outbox("due_at IS NOT NULL, completed_at"))
    ended = stand.deliver(sent)

    assert after_crash == ([], [], [(True, None)])
    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert stand.effects() == ["a"]
    assert [child.args for child in stand.sent()] == [["child"]]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2.5, "é", None, True]},
        datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
        Decimal("1.10"),
        UUID(int=7),
        "x" * 100_000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_result_is_replayed_as_it_was(stand: OutboxStand, value: Any) -> None:
    """Whatever Celery's JSON carries; a chord counts on members that look alike."""

    @stand.task(name="returns", once=True)
    def returns(session: Session) -> Any:
        return value

    sent = start(stand, returns)

    assert [stand.deliver(sent).value for _ in range(2)] == [value, value]


def test_result_that_cannot_be_kept_commits_nothing(stand: OutboxStand) -> None:
    """It could not be replayed; the failure is the task's own."""

    @stand.task(name="returns", once=True)
    def returns(session: Session) -> Any:
        session.add(Effect(name="a"))
        return object()

    ended = stand.deliver(start(stand, returns))

    assert ended.state == "FAILURE"
    assert stand.effects() == []
    assert stand.outbox("died_at IS NOT NULL") == [True]


@WAYS
def test_chain_goes_on_after_any_number_of_deliveries(stand: OutboxStand, begin: Start) -> None:
    """The next link goes out with the commit, once, and is not sent again by a duplicate."""
    task = count(stand)
    with stand.alchemy.begin() as session:
        if begin is start:
            enqueue(session, chain(task.si("a"), task.si("b"), stand.effect.si("c")))
    if begin is start_past_outbox:
        chain(task.si("a"), task.si("b"), stand.effect.si("c")).apply_async()
    [first] = stand.sent()

    stand.deliver(first)
    stand.deliver(first)
    [second] = stand.sent()
    stand.deliver(second)
    stand.deliver(second)
    stand.deliver(first)
    [third] = stand.sent()
    stand.deliver(third)

    assert stand.effects() == ["a", "b", "c"]


def test_what_comes_after_a_task_that_is_sent_again_with_its_id_goes_on(stand: OutboxStand) -> None:
    """An id of the application's own names the work; another sender's chain waits for it as well."""

    @stand.task(name="charge", once=True)
    def charge(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        return name

    charge.apply_async(("a",), task_id="order-1", link=stand.effect.si("linked"))
    [first] = stand.sent()
    stand.deliver(first)
    [linked] = stand.sent()
    chain(charge.s("a").set(task_id="order-1"), stand.effect.si("after")).apply_async()
    [again] = stand.sent()
    for sent in (again, first):
        stand.deliver(sent)
    [after] = stand.sent()
    for sent in (linked, after):
        stand.deliver(sent)

    assert stand.effects() == ["a", "linked", "after"]


@WAYS
def test_chain_and_callbacks_of_another_task_with_the_same_key_go_on_too(stand: OutboxStand, begin: Start) -> None:
    """Each of two senders waits for what comes after its own task, whichever of the two does the work."""

    @stand.task(name="keyed", once=lambda name: name)
    def keyed(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        return name

    def chained(after: str) -> Sent:
        signature = chain(keyed.s("a"), stand.effect.si(after))
        if begin is start_past_outbox:
            signature.apply_async()
        else:
            with stand.alchemy.begin() as session:
                enqueue(session, signature)
        [sent] = stand.sent()
        return sent

    first, second = chained("after the first"), chained("after the second")
    for sent in (second, first, second):
        stand.deliver(sent)
    for sent in stand.sent():
        stand.deliver(sent)

    assert stand.effects() == ["a", "after the second", "after the first"]


def test_next_link_is_kept_when_the_broker_is_down_at_the_commit(stand: OutboxStand) -> None:
    """A chain does not end because the broker was away for the moment between two links."""
    with stand.alchemy.begin() as session:
        enqueue(session, chain(count(stand).si("a"), stand.effect.si("b")))
    [first] = stand.sent()

    with stand.broker_down():
        stand.deliver(first)
    lost = stand.sent()
    stand.make_due()
    stand.relay_all()

    assert lost == []
    assert [sent.args for sent in stand.sent()] == [["b"]]


@pytest.mark.parametrize("by", ["itself", "a task that is lent its session", "a block", "a thread"])
def test_sends_of_a_once_task_are_kept_without_an_outbox_too(make_stand: MakeStand, by: str) -> None:
    """What is sent in its transaction must be one with its completion, whoever sends: nothing would send it again."""
    stand = make_stand(outbox=False)

    @stand.task(name="inner")
    def inner(session: Session) -> None:
        stand.effect.delay_on_commit("child")

    @stand.task(name="fans out", once=True)
    def fans_out(session: Session) -> None:
        if by == "itself":
            stand.effect.delay_on_commit("child")
        elif by == "a task that is lent its session":
            inner(session=session)
        elif by == "a block":
            with stand.alchemy.session():
                enqueue(session, stand.effect.s("child"))
        else:
            thread = Thread(target=lambda: enqueue(session, stand.effect.s("child")))
            thread.start()
            thread.join()

    fans_out.delay()
    [sent] = stand.sent()
    with stand.broker_down():
        stand.deliver(sent)
    stand.make_due("due_at IS NOT NULL")
    stand.relay_all()

    assert [child.args for child in stand.sent()] == [["child"]]


# --- keys -------------------------------------------------------------------------------------------------------------


@WAYS
def test_key_makes_different_tasks_one(stand: OutboxStand, begin: Start) -> None:
    """Two messages with two ids and one key: one effect, one result."""
    task = count(stand, once=lambda name: f"key:{name}")
    first, second, other = begin(stand, task, "a"), begin(stand, task, "a"), begin(stand, task, "b")

    ended = [stand.deliver(sent) for sent in (first, second, other)]

    assert first.id != second.id
    assert ended[0].value == ended[1].value != ended[2].value
    assert stand.effects() == ["a", "b"]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "key",
    [
        lambda name, copy: f"{name} {copy}",
        lambda name, copy=7: f"{name} {copy}",
        lambda copy, name: f"{name} {copy}",
        lambda name, **others: f"{name} {others['copy']}",
        lambda **arguments: f"{arguments['name']} {arguments['copy']}",
    ],
)
def test_key_is_the_same_however_the_arguments_are_passed(stand: OutboxStand, key: Any) -> None:
    """By position, by name, and with a default left out or given."""

    @stand.task(name="keyed", once=key)
    def keyed(session: Session, name: str, copy: int = 1) -> None:
        session.add(Effect(name=f"{name} {copy}"))

    for send in (keyed.s("a"), keyed.s("a", 1), keyed.s(name="a"), keyed.s("a", copy=1), keyed.s(copy=1, name="a"), keyed.s("a", 2)):
        with stand.alchemy.begin() as session:
            enqueue(session, send)
        [sent] = stand.sent()
        stand.deliver(sent)

    assert stand.effects() == ["a 1", "a 2"]


@pytest.mark.databases("sqlite")
def test_key_of_some_of_the_arguments(stand: OutboxStand) -> None:
    """What the key function does not name makes no difference; one with names of its own gets what was passed."""

    @stand.task(name="keyed", once=lambda order: f"{order}")
    def keyed(session: Session, order: int, amount: int) -> None:
        session.add(Effect(name=f"{order} {amount}"))

    @stand.task(name="other", once=lambda *passed: f"{passed}")
    def other(session: Session, *numbers: int) -> None:
        session.add(Effect(name=f"{numbers}"))

    for task, args in ((keyed, (7, 1)), (keyed, (7, 2)), (other, (1, 2)), (other, (1, 2)), (other, (1,))):
        stand.deliver(start(stand, task, *args))

    assert stand.effects() == ["7 1", "(1, 2)", "(1,)"]


@pytest.mark.parametrize(
    "canvas",
    [chain, group, lambda first, second: chord([first], second)],
)
def test_ids_that_the_caller_chose_may_be_sent_again(stand: OutboxStand, canvas: Callable[..., Any]) -> None:
    """By themselves or in a canvas: it is another delivery, not an error of the caller's commit."""
    task = count(stand)
    for _ in range(2):
        with stand.alchemy.begin() as session:
            session.add(Effect(name="caller"))
            enqueue(session, canvas(task.si("first").set(task_id="chosen 1"), task.si("second").set(task_id="chosen 2")))

    stand.run_all()

    effects = stand.effects()
    assert [effects.count(name) for name in ("caller", "first", "second")] == [2, 1, 1]


def test_once_implies_late_acknowledgement_and_reject_on_worker_lost(stand: OutboxStand) -> None:
    """However the task is made, and whatever it or the app says of it: else a message is gone before the work is done."""
    stand.app.conf.task_annotations = {"annotated": {"once": True}}
    stand.app.conf.task_acks_late = False

    class ByClass(SessionTask):
        name = "by class"
        once = True

        def run(self) -> None: ...

    by_class: Any = stand.app.register_task(ByClass())
    tasks = [count(stand), count(stand, name="annotated", once=False), count(stand, name="early", acks_late=False), by_class]

    assert [(task.name, task.acks_late, task.reject_on_worker_lost) for task in tasks] == [
        (name, True, True) for name in ("count", "annotated", "early", "by class")
    ]


def test_keys_differ_by_case_by_accent_and_by_task(stand: OutboxStand) -> None:
    """MariaDB's usual collation takes all of these for the same."""
    keys = ["resume", "Resume", "RESUME", "résumé", "resume.", "\uff52esume"]  # the last begins with a full-width letter
    task = count(stand, once=lambda name: name)

    @stand.task(name="other", once=lambda name: name)
    def other(session: Session, name: str) -> None:
        session.add(Effect(name=f"other {name}"))

    for key in keys:
        stand.deliver(start(stand, task, key))
        stand.deliver(start(stand, task, key))
    stand.deliver(start(stand, other, "resume"))

    assert stand.effects() == [*keys, "other resume"]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("key", "says"),
    [
        (7, "int"),
        (None, "NoneType"),
        ("", "''"),
        (" a", "' a'"),
        ("a ", "'a '"),
        ("a\0", "a"),
        ("a\ud800", "a"),
        ("x" * 300, "306 characters"),
    ],
)
def test_key_that_cannot_be_used_is_refused(stand: OutboxStand, key: Any, says: str) -> None:
    """In the caller, before anything is written; in the worker for a message that came past the outbox."""
    task = count(stand, once=lambda name: key)

    with stand.alchemy.begin() as session:
        session.add(Effect(name="kept"))
        with pytest.raises(OnceKeyError, match=says):
            enqueue(session, task.s("a"))
    ended = stand.deliver(start_past_outbox(stand, task, "a"))

    assert stand.effects() == ["kept"]
    assert (ended.state, type(ended.value)) == ("FAILURE", OnceKeyError)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("by_outbox", [True, False])
def test_retry_with_other_arguments_ends_the_row_that_it_began(stand: OutboxStand, by_outbox: bool) -> None:
    """Of those another key would be made: the first one would be owed for ever, and the other one's work be done."""

    @stand.task(name="ships", once=lambda place: place, bind=True, max_retries=3)
    def ships(self: Any, session: Session, place: str) -> str:
        session.add(Effect(name=place))
        if place == "EU":
            raise self.retry(args=("US",), countdown=0)
        return place

    sent = (start if by_outbox else start_past_outbox)(stand, ships, "EU")
    states = [stand.deliver(sent).state]
    states += [stand.deliver(again).state for again in stand.sent()]
    again, other = stand.deliver(start_past_outbox(stand, ships, "EU")), stand.deliver(start(stand, ships, "US"))

    assert states == ["RETRY", "SUCCESS"]
    assert (again.value, other.value) == ("US", "US")
    assert stand.effects() == ["US", "US"]
    assert stand.outbox("completed_at IS NULL, id") == [(0, "ships:EU"), (0, "ships:US")]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("takes_rest", [True, False])
def test_key_of_a_task_that_takes_any_arguments_gets_those_that_it_names(stand: OutboxStand, takes_rest: bool) -> None:
    """However many there are more, by position or by name."""
    seen: list[tuple[Any, ...]] = []

    def key(order: int, by: str = "", names: tuple[str, ...] = ()) -> str:
        seen.append((order, by, names))
        return f"order {order}"

    def key_of_order(order: int) -> str:
        seen.append((order, "", ()))
        return f"order {order}"

    @stand.task(name="items", once=key if takes_rest else key_of_order)
    def items(session: Session, order: int, *names: str, by: str = "nobody") -> None:
        session.add(Effect(name=f"{order} {names} {by}"))

    stand.deliver(start(stand, items, 7, "a", "b", kwargs={"by": "Ann"}))
    stand.deliver(start(stand, items, 7))
    stand.deliver(start(stand, items, kwargs={"order": 8}))

    assert stand.effects() == ["7 ('a', 'b') Ann", "8 () nobody"]
    assert set(seen) == ({(7, "Ann", ("a", "b")), (7, "nobody", ()), (8, "nobody", ())} if takes_rest else {(7, "", ()), (8, "", ())})


def test_id_that_is_too_long_is_refused_in_the_caller(stand: OutboxStand) -> None:
    """One that the caller chose, for a task without a key: it is the id of the row."""
    with stand.alchemy.begin() as session:
        session.add(Effect(name="kept"))
        with pytest.raises(OnceKeyError, match="300 characters"):
            enqueue(session, count(stand, once=True).s("a"), task_id="x" * 300)

    assert stand.effects() == ["kept"]


def test_longest_key_fits(stand: OutboxStand) -> None:
    """255 characters with the task's name, of any script."""
    task = count(stand, once=lambda name: name)
    key = "é" * (255 - len("count:"))

    stand.deliver(start(stand, task, key))
    stand.deliver(start(stand, task, key))

    assert len(stand.effects()) == 1


# --- commits in the body ----------------------------------------------------------------------------------------------


def test_commit_of_writes_in_the_body_is_refused(stand: OutboxStand) -> None:
    """They would be committed again by the next delivery; the text says why, and nothing stays."""

    @stand.task(name="commits", once=True)
    def commits(session: Session) -> None:
        session.add(Effect(name="a"))
        session.commit()

    ended = stand.deliver(start(stand, commits))

    assert (ended.state, type(ended.value)) == ("FAILURE", OnceCommitError)
    assert "committed again" in str(ended.value)
    assert stand.effects() == []


def test_commit_of_sends_in_the_body_is_refused(stand: OutboxStand) -> None:
    """A send that went out before the completion would go out again under another id."""

    @stand.task(name="commits", once=True)
    def commits(session: Session) -> None:
        stand.effect.delay_on_commit("ghost")
        session.commit()

    ended = stand.deliver(start(stand, commits))

    assert (ended.state, type(ended.value)) == ("FAILURE", OnceCommitError)
    assert stand.sent() == []


def test_released_savepoints_and_commits_of_nothing_are_fine(stand: OutboxStand) -> None:
    """Reading, giving the connection back, and SAVEPOINTs commit no writes."""

    @stand.task(name="reads", once=True)
    def reads(session: Session) -> int:
        session.execute(select(Effect))
        session.commit()
        with released(session):
            held = stand.alchemy.engine.pool.checkedout()  # type: ignore[attr-defined]
        with session.begin_nested():
            session.add(Effect(name="kept"))
        savepoint = session.begin_nested()
        session.add(Effect(name="ghost"))
        session.flush()
        savepoint.rollback()
        return int(held)

    sent = start(stand, reads)
    ended = [stand.deliver(sent) for _ in range(2)]

    assert [(one.state, one.value) for one in ended] == [("SUCCESS", 0)] * 2
    assert stand.effects() == ["kept"]


# --- calls without a worker -------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite", "postgresql")
def test_eager_and_direct_calls_run_the_body(stand: OutboxStand) -> None:
    """A direct call has no task id to be known by and runs each time; apply() with an id twice runs once; a key counts always."""
    by_id = count(stand)

    @stand.task(name="by key", once=lambda name: name)
    def by_key(session: Session, name: str) -> None:
        session.add(Effect(name=name))

    by_id("direct")
    by_id("direct")
    by_id.apply(("eager",), task_id="one")
    by_id.apply(("eager",), task_id="one")
    by_key("key")
    by_key("key")

    assert stand.effects() == ["direct", "direct", "eager", "key"]


def test_session_of_the_caller_makes_a_direct_call_part_of_its_transaction(stand: OutboxStand) -> None:
    """It is neither recorded nor committed, with a key or without."""
    by_id = count(stand)

    @stand.task(name="by key", once=lambda name: name)
    def by_key(session: Session, name: str) -> None:
        session.add(Effect(name=name))

    with stand.alchemy.session() as session:
        by_id(name="id", session=session)
        by_key(name="key", session=session)
        by_key(name="key", session=session)
        session.rollback()
        by_key(name="key", session=session)
        session.commit()

    assert stand.effects() == ["key"]
    assert stand.outbox() == []


# --- what it costs ----------------------------------------------------------------------------------------------------


def statements_of(stand: OutboxStand, act: Callable[[], object]) -> list[str]:
    """Return what a callable sends through the Alchemy's engine, without BEGIN, COMMIT and SAVEPOINT."""
    statements: list[str] = []

    def keep(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if not statement.startswith(("BEGIN", "SAVEPOINT", "RELEASE")):
            statements.append(" ".join(statement.split()))

    event.listen(stand.alchemy.engine, "before_cursor_execute", keep)
    try:
        act()
    finally:
        event.remove(stand.alchemy.engine, "before_cursor_execute", keep)
    return statements


@WAYS
def test_once_adds_at_most_two_statements_to_a_task(stand: OutboxStand, begin: Start) -> None:
    """One that looks at the start, one that completes at the end; a replay is one statement or two."""

    @stand.task(name="plain")
    def plain(session: Session, name: str) -> None:
        session.add(Effect(name=name))

    once = count(stand)
    sent_plain, sent = start(stand, plain, "a"), begin(stand, once, "a")

    without = statements_of(stand, lambda: stand.deliver(sent_plain))
    first = statements_of(stand, lambda: stand.deliver(sent))
    replay = statements_of(stand, lambda: stand.deliver(sent))

    assert len(without) == 1
    assert len(first) <= len(without) + 2, first
    assert len(replay) <= 2, replay


@pytest.mark.parametrize("once", [False, True])
def test_enqueue_adds_one_insert_to_the_transaction_and_one_statement_after_it(stand: OutboxStand, once: bool) -> None:
    """However many tasks it sends: they are one INSERT and one settlement."""
    task = count(stand, name="counted", once=once)

    def send(number: int) -> None:
        with stand.alchemy.begin() as session:
            for _ in range(number):
                enqueue(session, task.s("a"))
        stand.handed_over()

    for number in (1, 5):
        statements = statements_of(stand, lambda number=number: send(number))  # type: ignore[misc]
        sent = [word for statement in statements if (word := statement.split()[0]) != "SET"]
        assert sent == ["INSERT", "UPDATE" if once else "DELETE"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite")
def test_once_that_cannot_work_is_refused_when_the_task_is_made(stand: OutboxStand) -> None:
    """Once of a wrong kind; a task that may not write cannot record that it is done; one that commits before it is done, or never."""
    wrong: list[dict[str, Any]] = [{"once": "yes"}, {"once": 1}, {"once": True, "read_only": True}]
    wrong += [{"once": True, "commit_on": outcomes} for outcomes in ((), ("retry",), ("success", "retry"), ("success", "reject"))]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            count(stand, name=f"bad {options}", **options).s("a").apply_async()


@pytest.mark.parametrize("options", [{"redeliver_after": 0}, {"redeliver_after": -1}, {"max_deliveries": 0}, {"once_window": 0}])
@pytest.mark.databases("sqlite")
def test_numbers_that_cannot_work_are_refused_at_once(make_stand: MakeStand, options: dict[str, Any]) -> None:
    """The text names the option and the value."""
    [(name, value)] = options.items()

    with pytest.raises(ConfigurationError, match=f"{name}={value}"):
        make_stand(**options)


@pytest.mark.parametrize(
    "options", [{"redeliver_after": 0}, {"redeliver_after": "900"}, {"max_deliveries": -1}, {"max_deliveries": 1.5}]
)
@pytest.mark.databases("sqlite")
def test_numbers_of_a_task_that_cannot_work_are_refused_at_once(stand: OutboxStand, options: dict[str, Any]) -> None:
    """As those of the Alchemy; the text names the task too."""
    [name] = options

    with pytest.raises(ConfigurationError, match=f"{name}=.*count"):
        count(stand, **options).s("a").apply_async()


@pytest.mark.databases("sqlite")
def test_task_is_never_sent_again_while_its_time_limit_lets_it_run(make_stand: MakeStand) -> None:
    """redeliver_after shorter than the hard time limit is put right: a second run beside the first helps nobody."""
    stand = make_stand(redeliver_after=10)
    start(stand, count(stand), "a", time_limit=100)

    assert stand.outbox("redeliver_seconds")[0] > 100


def test_limit_of_the_worker_itself_puts_the_next_sending_off_too(make_stand: MakeStand, request: pytest.FixtureRequest) -> None:
    """`celery worker --time-limit` holds for tasks without a limit of their own; who sends them does not know it."""
    request.addfinalizer(functools.partial(set_worker_pool, worker_pool()))
    set_worker_pool(WorkerPool("prefork", 1, time_limit=5000.0))
    stand = make_stand(redeliver_after=10)
    clock = "extract(epoch FROM due_at - now())"
    if stand.database.name != "postgresql":
        clock = "timestampdiff(SECOND, utc_timestamp(), due_at)"
    if stand.database.name == "sqlite":
        clock = "(julianday(due_at) - julianday('now')) * 86400"
    waits = []

    @stand.task(name="looks", once=True)
    def looks() -> None:
        waits.append(float(stand.outbox(clock)[0]))

    stand.deliver(start(stand, looks))

    assert 4900 < waits[0] < 5100


def test_missing_table_is_named_with_the_command_that_makes_it(stand: OutboxStand) -> None:
    """In the caller that enqueues, and in the worker that runs a once task."""
    task = count(stand)
    sent = start_past_outbox(stand, task, "a")
    stand.database.execute("DROP TABLE celery_outbox")

    with pytest.raises(MissingTableError, match="create-tables"), stand.alchemy.begin() as session:
        enqueue(session, task.s("a"))
    ended = stand.deliver(sent)

    assert (ended.state, type(ended.value)) == ("FAILURE", MissingTableError)
    assert "celery_outbox" in str(ended.value)


def test_what_the_app_commits_on_a_retry_is_rolled_back_in_a_once_task(make_stand: MakeStand) -> None:
    """The message of an attempt may come twice; what it wrote would be there twice."""
    stand = make_stand(commit_on=("success", "retry"))

    @stand.task(name="again", once=True, bind=True)
    def again(self: Any, session: Session, name: str) -> None:
        session.add(Effect(name=f"{name} {self.request.retries}"))
        if self.request.retries < 1:
            raise self.retry(countdown=0)

    first = start(stand, again, "attempt")
    stand.deliver(first)
    stand.deliver(first)
    for sent in stand.sent():
        stand.deliver(sent)

    assert stand.effects() == ["attempt 1"]
