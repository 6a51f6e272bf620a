"""A parameter annotated with Session is injected, wherever it stands, and does not exist for callers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NewType, Optional, TypeVar

import celery
import pytest
from celery import signature
from pydantic import BaseModel
from sqlalchemy import event
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeAliasType

from celery_alchemy import Alchemy, ConfigurationError, SessionArgumentError, SessionParameterError, SessionTask
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Shop, add_books

if TYPE_CHECKING:
    from nowhere import Nothing  # type: ignore[import-not-found] # pyright: ignore[reportMissingImports]
    from sqlalchemy.orm import Session as HiddenSession

pytestmark = pytest.mark.databases("sqlite")

Values = tuple[bool, int, int]


class ShopSession(Session):
    """A user's own Session class."""


class Order(BaseModel):
    """What a caller of a pydantic task sends."""

    title: str
    copies: int


def first(session: Session, left: int, right: int = 2) -> Values:
    return isinstance(session, Session), left, right


def middle(left: int, session: Session, right: int = 2) -> Values:
    return isinstance(session, Session), left, right


def last(left: int, right: int, session: Session) -> Values:
    return isinstance(session, Session), left, right


def keyword_only(left: int, right: int = 2, *, session: Session) -> Values:
    return isinstance(session, Session), left, right


def positional_only(left: int, session: Session, /, right: int = 2) -> Values:
    return isinstance(session, Session), left, right


def with_default(left: int, right: int = 2, session: Session | None = None) -> Values:
    return isinstance(session, Session), left, right


def optional(left: int, session: Optional[Session], right: int = 2) -> Values:  # noqa: UP045
    return isinstance(session, Session), left, right


def annotated(session: Annotated[Session, "the shop"], left: int, right: int = 2) -> Values:
    return isinstance(session, Session), left, right


def annotated_optional(session: Annotated[Optional[Session], 3], left: int, right: int = 2) -> Values:  # noqa: UP045
    return isinstance(session, Session), left, right


def subclass(left: int, right: int = 2, *, session: ShopSession) -> Values:
    return isinstance(session, Session), left, right


def beside_unresolved(session: Session, left: int, right: int | Nothing = 2) -> Values:
    return isinstance(session, Session), left, right


def before_variadic(session: Session, left: int, *rights: int) -> Values:
    return isinstance(session, Session), left, rights[0]


def bound_first(self: SessionTask, session: Session, left: int, right: int = 2) -> Values:
    return self.session is session, left, right


def bound_last(self: SessionTask, left: int, right: int, session: Session) -> Values:
    return self.session is session, left, right


def bound_keyword_only(self: SessionTask, left: int, right: int = 2, *, session: Session) -> Values:
    return self.session is session, left, right


def without_annotation(self: SessionTask, left: int, right: int = 2) -> Values:
    return isinstance(self.session, Session), left, right


PLAIN = [
    first,
    middle,
    last,
    keyword_only,
    positional_only,
    with_default,
    optional,
    annotated,
    annotated_optional,
    subclass,
    beside_unresolved,
    before_variadic,
]
BOUND = [bound_first, bound_last, bound_keyword_only, without_annotation]


def as_task(shop: Shop, body: Callable[..., Any]) -> Any:
    return shop.task(name=body.__name__, bind=body in BOUND)(body)


@pytest.mark.parametrize("body", [*PLAIN, *BOUND])
def test_session_is_injected_wherever_it_stands(shop: Shop, body: Callable[..., Any]) -> None:
    """Direct calls, eager calls, signatures and the worker's tracer all fill the parameter in."""
    task = as_task(shop, body)

    results = [
        task(1, 2),
        task.apply(args=[1, 2]).get(),
        task.s(2).apply(args=[1]).get() if body is before_variadic else task.s(1, 2).apply().get(),
        signature(body.__name__, (1, 2), app=shop.app).apply().get(),
        shop.trace(task, 1, 2).value,
    ]

    assert results[:2] == [(True, 1, 2)] * 2
    assert [tuple(result) for result in results[3:]] == [(True, 1, 2)] * 2
    assert results[2][0] is True


@pytest.mark.parametrize("body", [*PLAIN[:4], *PLAIN[5:-1], *BOUND])
def test_session_is_injected_among_keywords(shop: Shop, body: Callable[..., Any]) -> None:
    """Arguments by keyword, and by position and keyword mixed, leave the session its place."""
    task = as_task(shop, body)

    results = [
        task(left=1, right=2),
        task(1, right=2),
        task.apply(kwargs={"left": 1, "right": 2}).get(),
        task.s(right=2).apply(kwargs={"left": 1}).get(),
        shop.trace(task, 1, right=2).value,
    ]

    assert results == [(True, 1, 2)] * 5


TheSession = NewType("TheSession", Session)
AnySession = TypeVar("AnySession", bound=Session)
ShopDatabase = TypeAliasType("ShopDatabase", Annotated[Session, "the shop's"])


@pytest.mark.parametrize("name", [TheSession, AnySession, ShopDatabase, ShopDatabase | None], ids=str)
def test_names_for_an_annotation_are_followed(shop: Shop, name: Any) -> None:
    """A `type` statement gives a project one name for `Annotated[Session, ...]`."""

    def work(left: int, session: Any, right: int = 2) -> Values:
        return isinstance(session, Session), left, right

    work.__annotations__["session"] = name

    assert as_task(shop, work)(1) == (True, 1, 2)


def test_local_class_that_cannot_be_resolved_is_no_silent_argument(shop: Shop) -> None:
    """With postponed annotations nobody can find a function's local name; the caller must not be asked for a session."""

    class LocalSession(Session):
        pass

    def rename(session: LocalSession, title: str) -> None: ...

    with pytest.raises(SessionParameterError, match=r"'LocalSession'.*cannot be resolved.*local name"):
        shop.task(lazy=False)(rename)


def test_session_is_of_the_class_of_the_annotation(shop: Shop) -> None:
    """A subclass has methods of its own, such as SQLModel's `exec()`; the body gets what its annotation says, from a URL too."""

    @shop.task(bind=True)
    def work(self: Any, session: ShopSession) -> tuple[bool, bool, bool]:
        fresh = isinstance(session, ShopSession)
        add_books(session, ["Emma"])
        return fresh, type(session) is type(self.session), isinstance(self.session, ShopSession)

    @shop.task()
    def plain(session: Session) -> bool:
        return isinstance(session, ShopSession)

    assert work() == (True, True, True)

    assert shop.titles() == ["Emma"]
    assert not plain()


def test_record_failure_gets_the_class_of_its_annotation(shop: Shop) -> None:
    """The rules of a task's body hold for it."""
    classes: list[bool] = []

    def record(session: ShopSession, exc: Exception) -> None:
        classes.append(isinstance(session, ShopSession))

    @shop.task(record_failure=record)
    def work(session: Session) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        work()

    assert classes == [True]


def test_sessionmaker_of_a_base_class_makes_sessions_of_the_annotation(database: Database) -> None:
    """With its options and its listeners; one of another class cannot, and the error says what to change."""
    Base.metadata.create_all(database.engine)
    app = celery.Celery("shop", broker="memory://", set_as_current=False)
    maker = sessionmaker(database.engine, autoflush=False)
    heard: list[Session] = []
    event.listen(maker, "after_begin", lambda session, *_: heard.append(session))
    alchemy = Alchemy(app, maker)

    class OtherSession(Session):
        pass

    other = celery.Celery("other", broker="memory://", set_as_current=False)
    Alchemy(other, sessionmaker(database.engine, class_=OtherSession))

    def work(session: ShopSession) -> tuple[bool, bool]:
        session.connection()
        return isinstance(session, ShopSession), session.autoflush

    assert task_of(app)(work)() == (True, False)
    assert alchemy.engine is database.engine
    assert len(heard) == 1
    with pytest.raises(ConfigurationError, match=r"asks for a .*ShopSession, and the sessionmaker makes a .*OtherSession"):
        task_of(other)(work)()


@pytest.mark.parametrize("body", [*PLAIN, *BOUND])
def test_callers_never_see_the_session(shop: Shop, body: Callable[..., Any]) -> None:
    """The signature that tools read has no session and no self, and `.delay()` checks arguments without them."""
    task = as_task(shop, body)

    task.delay(1, 2)

    assert next(iter(inspect.signature(task.run).parameters)) == "left"
    assert "session" not in inspect.signature(task.run).parameters
    assert inspect.signature(task) == inspect.signature(task.run)
    assert shop.waiting() == 1
    with pytest.raises(TypeError, match="left"):
        task.delay()
    if body is not before_variadic:
        with pytest.raises(TypeError, match="positional argument"):
            task.delay(1, 2, 3)
        with pytest.raises(TypeError, match="titel"):
            task.delay(1, 2, titel="x")
    assert shop.waiting() == 1


def test_argument_check_can_be_switched_off(shop: Shop) -> None:
    """`typing=False` is Celery's way to check nothing, with a session as without."""
    task = shop.task(typing=False)(first)

    task.delay()

    assert shop.waiting() == 1


@pytest.mark.parametrize("call", ["delay", "apply_async", "s"])
def test_session_in_a_message_is_refused(shop: Shop, call: str) -> None:
    """A session cannot travel, so it is refused where it is sent, by name and task."""
    task = shop.task(name="rename")(first)
    session = Session()

    def send() -> None:
        if call == "delay":
            task.delay(session=session, left=1)
        elif call == "apply_async":
            task.apply_async((session, 1))
        else:
            task.s(1, session=session).delay()

    with pytest.raises(SessionArgumentError, match=r"rename\(\) got a value for 'session'"):
        send()
    assert shop.waiting() == 0


@pytest.mark.parametrize("options", [{}, {"transient_retries": 1}, {"once": True}], ids=str)
def test_what_is_no_session_in_its_place_is_refused(shop: Shop, options: dict[str, Any]) -> None:
    """By a direct call, an eager one, or a message that somebody else has made."""
    task = shop.task(name="rename", **options)(first)

    with pytest.raises(SessionArgumentError, match=r"rename\(\) got a value for 'session'"):
        task(1, session=5)
    assert isinstance(task.apply((1,), {"session": 5}).result, SessionArgumentError)
    assert isinstance(shop.trace(task, 1, session=5).value, SessionArgumentError)


def test_own_session_is_neither_committed_nor_closed(shop: Shop) -> None:
    """A test that passes its session by keyword keeps it open, with the task's uncommitted rows in it."""

    @shop.task()
    def add(session: Session, title: str) -> None:
        add_books(session, [title])

    with Session(shop.alchemy.engine) as own:
        add(session=own, title="Emma")
        in_transaction, committed = own.in_transaction(), shop.titles()
        own.commit()

    assert in_transaction
    assert committed == []
    assert shop.titles() == ["Emma"]


def test_own_session_survives_a_failing_body(shop: Shop) -> None:
    """A failing task leaves the session that it was lent as it is."""

    @shop.task(bind=True)
    def add(self: SessionTask, session: Session, title: str) -> None:
        assert self.session is session
        add_books(session, [title])
        raise LookupError(title)

    with Session(shop.alchemy.engine) as own:
        with pytest.raises(LookupError):
            add(session=own, title="Emma")
        assert own.in_transaction()
        own.commit()

    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("body", [first, middle, last, keyword_only, bound_first, bound_last])
def test_own_session_leaves_positional_arguments_their_places(shop: Shop, body: Callable[..., Any]) -> None:
    """`rename(7, "x", session=mine)` fills the parameter in, wherever it stands."""
    task = as_task(shop, body)

    with Session() as own:
        assert task(1, 2, session=own) == (True, 1, 2)


def test_none_for_the_session_asks_for_a_fresh_one(shop: Shop) -> None:
    """A caller that hands an absent session through gets the task's own, committed and closed."""

    @shop.task()
    def add(title: str, session: Session | None = None) -> None:
        assert session is not None
        add_books(session, [title])

    add("Emma", session=None)

    assert shop.titles() == ["Emma"]
    assert shop.checked_out() == 0


@pytest.mark.skipif(celery.VERSION < (5, 6), reason="Celery 5.6 was the first to dump the models that a caller gives")
@pytest.mark.parametrize("bind", [False, True])
def test_pydantic_models_travel_beside_a_session(shop: Shop, bind: bool) -> None:
    """`pydantic=True` validates what the worker gets and dumps what the caller gives; the session is in neither's way."""

    def plain(session: Session, order: Order, copies: int = 1) -> Order:
        return Order(title=order.title, copies=copies if session.is_active else 0)

    def bound(self: SessionTask, order: Order, session: Session, copies: int = 1) -> Order:
        return plain(self.session, order, copies)

    task = shop.task(pydantic=True, bind=bind)(bound if bind else plain)
    order = Order(title="Emma", copies=3)

    task.delay(order, copies=5)
    task.delay(order=order)
    result = shop.trace(task, {"title": "Emma", "copies": 3}, copies=5)

    assert shop.waiting() == 2
    assert result.value == {"title": "Emma", "copies": 5}
    assert task.apply(args=[order.model_dump()]).get() == {"title": "Emma", "copies": 1}


def test_chain_passes_results_on_beside_the_session(shop: Shop) -> None:
    """In a chain the result of one task is the first argument after the injected ones of the next."""

    @shop.task()
    def double(session: Session, number: int) -> int:
        return number * 2 if session.is_active else 0

    assert (double.s(1) | double.s() | double.s()).apply().get() == 8


def test_decorated_body_keeps_its_session(shop: Shop) -> None:
    """A user's decorator with functools.wraps around the body hides nothing."""

    def twice(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            body(*args, **kwargs)
            return body(*args, **kwargs)

        return call

    task = shop.task()(twice(middle))

    assert task(1, 2) == (True, 1, 2)
    assert task(left=1) == (True, 1, 2)


def with_tenant(body: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the first argument for itself, as decorators for tenants, locks and users do."""

    @functools.wraps(body)
    def call(tenant: str, *args: Any, **kwargs: Any) -> Any:
        return tenant, body(*args, **kwargs)

    return call


@pytest.mark.parametrize("body", [first, middle, last, keyword_only, with_default])
def test_decorator_that_takes_an_argument_for_itself_gets_it(shop: Shop, body: Callable[..., Any]) -> None:
    """The session goes past it to the body, by its name; so do the arguments behind the session."""
    task = shop.task(name="work")(with_tenant(body))

    results = [
        task("acme", 1, 2),
        task("acme", 1, right=2),
        task(tenant="acme", left=1, right=2),
        task.apply(args=["acme", 1, 2]).get(),
        shop.trace(task, "acme", 1, 2).value,
    ]

    assert [(tenant, tuple(values)) for tenant, values in results] == [("acme", (True, 1, 2))] * 5
    assert list(inspect.signature(task).parameters) == ["tenant", "left", "right"]


def test_decorator_of_a_bound_task_takes_an_argument_for_itself(shop: Shop) -> None:
    """The task is given to it as ever; among decorators, each is seen through."""

    def with_lock(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(self: SessionTask, tenant: str, *args: Any, **kwargs: Any) -> Any:
            return tenant, body(self, *args, **kwargs)

        return call

    def logged(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            return body(*args, **kwargs)

        return call

    task = shop.task(bind=True, name="work")(logged(with_lock(logged(bound_first))))

    assert task("acme", 1, 2) == ("acme", (True, 1, 2))
    assert task("acme", left=1) == ("acme", (True, 1, 2))


def test_decorator_that_names_the_session_gets_it_there(shop: Shop) -> None:
    """It may look at the session, and hand it on as it likes."""

    def counting(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(tenant: str, session: Session, *args: Any) -> Any:
            return tenant, body(session, *args)

        return call

    task = shop.task()(counting(first))
    task.delay("acme", 1, 2)

    assert task("acme", 1, 2) == ("acme", (True, 1, 2))
    assert shop.waiting() == 1
    with pytest.raises(TypeError, match="tenant"):
        task.delay()


def test_decorator_that_gives_the_session_itself_keeps_doing_so(shop: Shop) -> None:
    """It takes neither that parameter nor names for others: nothing is injected."""

    def provided(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(left: int, right: int) -> Any:
            with Session() as own:
                return body(own, left, right)

        return call

    assert shop.task()(provided(first))(1, 2) == (True, 1, 2)


def test_decorator_past_which_no_session_can_be_given_is_refused(shop: Shop) -> None:
    """It would get the session for its own argument; the error names that."""

    def with_tenant(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def call(tenant: str, *args: Any) -> Any:
            return tenant, body(*args)

        return call

    with pytest.raises(SessionParameterError, match=r"takes 'tenant' and hands on no.*\*\*kwargs"):
        bool(shop.task()(with_tenant(first)))


def test_positional_only_session_behind_a_default_is_injected(shop: Shop) -> None:
    """The arguments that are left out get their defaults, so that the session stands at its place."""

    def work(left: int, right: int = 2, session: Session | None = None, /) -> Values:
        return isinstance(session, Session), left, right

    task = shop.task()(work)

    assert task(1) == task(1, 2) == task.apply(args=[1]).get() == (True, 1, 2)
    with pytest.raises(TypeError):
        task()


def test_task_without_a_session_parameter_is_left_alone(shop: Shop) -> None:
    """A parameter that is merely called session is an ordinary argument."""

    @shop.task()
    def log_in(session: str) -> str:
        return session

    assert log_in("token") == "token"
    assert log_in.apply(args=["token"]).get() == "token"


def test_two_parameters_for_one_session_are_refused(shop: Shop) -> None:
    """Both would be the same session; the error names both and says how to reach another database."""

    def copy(source: Session, target: Session) -> None: ...

    with pytest.raises(SessionParameterError, match=r"'source' and as 'target'.*with analytics.begin\(\)"):
        bool(shop.task()(copy))


def test_variadic_session_is_refused(shop: Shop) -> None:
    """`*sessions: Session` names no number of sessions."""

    def copy(*sessions: Session) -> None: ...

    with pytest.raises(SessionParameterError, match="Name one parameter"):
        bool(shop.task()(copy))


def test_unresolvable_session_annotation_is_refused(shop: Shop) -> None:
    """A Session imported for type checkers only is an error at once, and not a TypeError in the worker."""

    def rename(session: HiddenSession, title: str) -> None: ...

    rename.__annotations__["session"] = "orm.Session"

    with pytest.raises(SessionParameterError, match="outside of `if TYPE_CHECKING"):
        bool(shop.task()(rename))


HIDDEN = [
    "HiddenSession | None",
    "Optional[orm.Session]",
    "Annotated[HiddenSession, 3]",
    "Optional[Annotated['AsyncSession', 3]]",
    "Union[None, HiddenSession]",
    Optional["HiddenSession"],
    Annotated["HiddenSession", 3],
]


@pytest.mark.parametrize("annotation", HIDDEN, ids=str)
def test_unresolvable_session_among_other_names_is_refused(shop: Shop, annotation: Any) -> None:
    """A default of None would silently be what the body gets."""

    def rename(title: str, session: Any = None) -> None: ...

    rename.__annotations__["session"] = annotation

    with pytest.raises(SessionParameterError, match="outside of `if TYPE_CHECKING"):
        bool(shop.task()(rename))


@pytest.mark.parametrize(
    "annotation", ["sessionmaker[HiddenSession]", "Callable[[Session], Nothing]", "Nothing | None", "not a type"]
)
def test_unresolvable_annotation_that_only_speaks_of_sessions_is_left_alone(shop: Shop, annotation: str) -> None:
    """What makes sessions is none, and the caller's to give."""

    def rename(make: Any = None) -> bool:
        return make is None

    rename.__annotations__["make"] = annotation

    assert shop.task()(rename)() is True
