"""Where sessions come from: a source for each kind of ``bind``, and sessions that are made when they are first used.

Underneath the request: ``request.py`` and ``alchemy.py`` ask a source for a session, ``engine.py`` gives the source its engine.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from itertools import repeat
from types import FunctionType
from typing import Any, Protocol, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from .errors import ConfigurationError
from .ledger import LEDGER, NO_OPTIONS, Ledger, SessionOptions, keep_ledger, listen, observe

__all__ = [
    "DEFERRED",
    "CallableSource",
    "OneMaker",
    "SessionOptions",
    "SessionSource",
    "SessionmakerSource",
    "is_open",
    "joined_class",
    "refuse_unfit",
]

#: A key of the __dict__ of sessions that have not been used; its value says what they need when they are.
DEFERRED = "_celery_alchemy_open"

#: Where a class of deferred sessions has the source that opens them.
_SOURCE = "_celery_alchemy_source"


class Asks(Protocol):
    """Says what a session needs, when it is opened and not before."""

    def session_options(self) -> SessionOptions: ...


class _AsksNothing:
    def session_options(self) -> SessionOptions:
        return NO_OPTIONS


NOTHING = _AsksNothing()


class SessionSource(Protocol):
    """Gives sessions for one database (or one set of ``binds``)."""

    @property
    def deferred_class(self) -> type[Session] | None:
        """The class of sessions that are opened at first use: ``session()`` makes one and says in DEFERRED who asks.

        None where nothing can be deferred.
        """
        ...

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return a new session that has no connection yet."""
        ...

    def opened(self, options: SessionOptions = ...) -> Session:
        """Return the same for one who is going to use it: it is not deferred. It has no connection yet either."""
        ...

    def of_class(self, class_: type[Session], asker: str) -> SessionSource:
        """Return a source of the same sessions, but of a class that a task's parameter is annotated with.

        Args:
            class_: The class; derived from the source's own, or a base of it.
            asker: The task, for messages.

        Raises:
            ConfigurationError: The classes are not related.
        """
        ...

    def engine(self) -> Engine | None:
        """Return this process's engine; None where the source does not know one."""
        ...


def is_open(session: Session) -> bool:
    """Tell whether a session has been used at all; one that has not holds nothing that would need an end."""
    return DEFERRED not in session.__dict__


def _open_at_first_use(session: Session, name: str) -> Any:
    """Run the deferred ``__init__`` and return the attribute (as ``__getattr__`` of a deferred class).

    Python calls it for what is not there yet: before ``__init__`` has run, that is nearly everything.
    """
    _open(session)
    return getattr(session, name)


def _open_at_first_assignment(session: Session, name: str, value: object) -> None:
    """Run the deferred ``__init__``, which would undo the assignment, and assign (as ``__setattr__``)."""
    _open(session)
    setattr(session, name, value)


def _open(session: Session) -> None:
    deferred = type(session)
    source: SessionmakerSource = getattr(deferred, _SOURCE)
    # From here on an ordinary class: Python reads every attribute of a class with __getattr__ more slowly, 4 us a transaction.
    object.__setattr__(session, "__class__", source.class_)
    try:
        source.open(session, session.__dict__[DEFERRED].session_options())
    except BaseException:
        # An engine that cannot be made, for example. Without the __init__ there is nothing that the end of the request could close.
        object.__setattr__(session, "__class__", deferred)
        raise
    del session.__dict__[DEFERRED]


_FIRST_USES = {
    "__init__": object.__init__,
    "__getattr__": _open_at_first_use,
    "__setattr__": _open_at_first_assignment,
}


def _first_reads(class_: type[Session]) -> dict[str, property]:
    """Return properties for what a class has of its own, such as ``info`` or a user's default, and ``__init__`` may set anew.

    Python finds it without ``__getattr__``. Methods, and ``dispatch`` for listeners, open the session by what they do.
    """
    names = (name for name in dir(class_) if not name.startswith("__") and name != "dispatch")
    values = {name: inspect.getattr_static(class_, name) for name in names}
    methods = (FunctionType, staticmethod, classmethod)
    return {name: _first_read(name) for name, value in values.items() if not isinstance(value, methods)}


def _first_read(name: str) -> property:
    return property(lambda session: _open_at_first_use(session, name))


#: Where a Session class has its subclass that keeps a ledger; on the class itself, with which it ends.
_KEPT = "_celery_alchemy_kept"


def kept_class(class_: type[Session]) -> type[Session]:
    """Return a subclass of a Session class that keeps a ledger."""
    kept: type[Session] | None = class_.__dict__.get(_KEPT)
    if kept is None:
        kept = _subclass(class_, {})
        setattr(class_, _KEPT, kept)
        listen(kept)
    return kept


def _subclass(class_: type[Session], members: Mapping[str, Any]) -> type[Session]:
    return type(class_.__name__, (class_,), {"__module__": class_.__module__, "__doc__": class_.__doc__, **members})


#: The events that loading, adding and committing one object ask a session's dispatcher for.
_USUAL_EVENTS = (
    "after_attach",
    "after_begin",
    "after_commit",
    "after_flush",
    "after_flush_postexec",
    "after_transaction_create",
    "after_transaction_end",
    "before_attach",
    "before_commit",
    "before_flush",
    "deleted_to_detached",
    "do_orm_execute",
    "loaded_as_persistent",
    "pending_to_persistent",
    "pending_to_transient",
    "persistent_to_detached",
    "persistent_to_transient",
    "transient_to_pending",
)


def _usual_listeners(class_: type[Session]) -> tuple[Any, ...]:
    """Return what the dispatchers of a class's sessions hold for the usual events, to be put there in advance.

    A dispatcher is made for each session, and finds each event's listeners, which are the class's, when it is first asked for them,
    through ``__getattr__``: 0.4 us for each of eleven to sixteen events of a transaction. To put them all there costs 1 us, which
    pays for what the library adds to a session. Listeners that come later, to the class or to one session, work as ever.
    """
    dispatch: Any = class_.__new__(class_).dispatch
    return tuple(getattr(dispatch, name) for name in _USUAL_EVENTS)


class Makers(Protocol):
    """Gives the sessionmaker of this process.

    Attributes:
        maker: What ``make()`` returned in this process; None until it was called.
    """

    maker: sessionmaker[Any] | None

    def make(self) -> sessionmaker[Any]:
        """Make, keep and return it."""
        ...


class OneMaker:
    """A sessionmaker that somebody has made already."""

    def __init__(self, maker: sessionmaker[Any]) -> None:
        self.maker: sessionmaker[Any] | None = maker
        self._made = maker

    def make(self) -> sessionmaker[Any]:
        """Return it."""
        return self._made


class SessionmakerSource:
    """Sessions as a ``sessionmaker`` makes them, with its class and its options, but deferred.

    A session is handed to every task that names one in its signature, also to those that return before they need it. Making a
    Session costs 2 to 3 us and closing it 4 us; a deferred one that is never used costs a tenth of a microsecond.

    Args:
        makers: Gives the sessionmaker of this process.
        class_: The class of its sessions.
    """

    def __init__(self, makers: Makers, class_: type[Session] = Session) -> None:
        self._makers = makers
        self._given_class = class_
        self._of_class: dict[type[Session], SessionmakerSource] = {}
        self.class_: type[Session] = kept_class(class_)
        self.deferred_class: type[Session] = _subclass(self.class_, {**_first_reads(self.class_), **_FIRST_USES, _SOURCE: self})
        self._listeners = _usual_listeners(self.class_)
        self._optioned: dict[tuple[Engine, str], Engine] = {}

    @property
    def maker(self) -> sessionmaker[Any]:
        """The sessionmaker of this process; its options are read anew for each session."""
        return self._makers.maker or self._makers.make()

    def engine(self) -> Engine | None:
        """Return the engine that the sessionmaker is bound to, if it is bound to one."""
        bind = self.maker.kw.get("bind")
        return bind.engine if isinstance(bind, (Engine, Connection)) else None

    def of_class(self, class_: type[Session], asker: str) -> SessionmakerSource:
        """Return a source of sessions of a class, from the same sessionmaker."""
        if issubclass(self._given_class, class_):
            return self
        if class_ not in self._of_class:
            self._of_class[class_] = SessionmakerSource(self._makers, joined_class(class_, self._given_class, asker))
        return self._of_class[class_]

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return a deferred session; nothing is connected, nothing is made before its first use."""
        session = self.deferred_class()
        session.__dict__[DEFERRED] = asks
        return session

    def opened(self, options: SessionOptions = NO_OPTIONS) -> Session:
        """Return a session whose ``__init__`` has run; for one who will use it this saves 3 us."""
        if options.isolation_level is not None:
            session = self.class_.__new__(self.class_)
            self.open(session, options)
            return session
        # As open() does it, for nearly every request, with two calls less.
        session = self.class_(**(self._makers.maker or self._makers.make()).kw)
        session.__dict__[LEDGER] = Ledger(options)
        # setattr() for each of them, without a loop in Python.
        deque(map(setattr, repeat(session.dispatch), _USUAL_EVENTS, self._listeners), 0)
        return session

    def open(self, session: Session, options: SessionOptions) -> None:
        """Run the ``__init__`` that was deferred."""
        keywords = dict((self._makers.maker or self._makers.make()).kw)
        if options.isolation_level is not None:
            self._isolate(keywords, options.isolation_level)
        session.__init__(**keywords)  # type: ignore[misc]
        keep_ledger(session, options)

    def _isolate(self, keywords: dict[str, Any], level: str) -> None:
        """Replace engines by engines of the same pool that begin with the isolation level."""
        if isinstance(keywords.get("bind"), Engine):
            keywords["bind"] = self._with_level(keywords["bind"], level)
        binds: Mapping[Any, Any] | None = keywords.get("binds")
        if binds:
            keywords["binds"] = {
                key: self._with_level(bind, level) if isinstance(bind, Engine) else bind for key, bind in binds.items()
            }

    def _with_level(self, engine: Engine, level: str) -> Engine:
        optioned = self._optioned.get((engine, level))
        if optioned is None:
            observe(engine)
            optioned = engine.execution_options(isolation_level=level)
            self._optioned[engine, level] = optioned
        return optioned


def joined_class(wanted: type[Any], given: type[Any], asker: str) -> type[Any]:
    """Return a class of sessions for a parameter, from which the sessionmaker's listeners hear too.

    Args:
        wanted: The class of the parameter's annotation.
        given: The ``class_`` of a sessionmaker, which derives a class of its own from the one it is given and listens on that; or
            Session or AsyncSession itself.
        asker: The task, for messages.

    Raises:
        ConfigurationError: ``wanted`` has nothing of the class that the sessionmaker was given.
    """
    if issubclass(wanted, given):
        return wanted
    told = given.__mro__[1]
    if not issubclass(wanted, told):
        raise ConfigurationError(
            f"{asker} asks for a {wanted.__module__}.{wanted.__qualname__}, and the sessionmaker makes a"
            f" {told.__module__}.{told.__qualname__}.",
            f"Give the sessionmaker class_={wanted.__qualname__}, or annotate the parameter with {told.__qualname__}.",
        )
    return type(wanted.__name__, (wanted, given), {"__module__": wanted.__module__, "__doc__": wanted.__doc__})


def refuse_unfit(make: Callable[..., Any], what: str) -> None:
    """Refuse a callable that can be seen to return no Session, such as a FastAPI dependency that yields one.

    Args:
        make: The callable.
        what: What it is, for messages.

    Raises:
        ConfigurationError: It needs arguments, or it is a generator or a coroutine function.
    """
    if inspect.isgeneratorfunction(make) or inspect.isasyncgenfunction(make):
        problem = f"{what} yields its session, and so would close it by itself."
    elif inspect.iscoroutinefunction(make):
        problem = f"{what} is an `async def`."
    else:
        try:
            inspect.signature(make).bind()
        except TypeError as exc:
            problem = f"{what} cannot be called without arguments: {exc}."
        except ValueError:
            return  # Written in C, without a signature.
        else:
            return
    raise ConfigurationError(problem, "Give a callable that takes no arguments and returns a new Session, such as a sessionmaker.")


class CallableSource:
    """Sessions from a user's own zero-argument callable, one call for each request.

    Args:
        make: Returns a new Session.
    """

    deferred_class = None

    def __init__(self, make: Callable[[], Session]) -> None:
        #: The user's callable.
        self.make = make

    def of_class(self, class_: type[Session], asker: str) -> CallableSource:
        """Return the source: what class its sessions have is the callable's affair."""
        return self

    def engine(self) -> Engine | None:
        """Return the engine of a session from the callable, if all of it is bound to one."""
        session = self.make()
        try:
            bind = session.bind
        finally:
            session.close()
        return bind.engine if isinstance(bind, (Engine, Connection)) else None

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return what the callable returns, with a ledger."""
        return self.opened(asks.session_options())

    def opened(self, options: SessionOptions = NO_OPTIONS) -> Session:
        """Return what the callable returns, with a ledger."""
        session = cast("object", self.make())
        if not isinstance(session, Session):
            raise ConfigurationError(
                f"The callable given to Alchemy returned {type(session).__name__!r}, which is no Session.",
                "Return a new sqlalchemy.orm.Session at each call.",
            )
        listen(session)
        keep_ledger(session, options)
        if options.isolation_level is not None:
            session.connection(execution_options={"isolation_level": options.isolation_level})
        return session
