"""Where sessions come from: a source for each kind of ``bind``.

A session may be made when it is first used.

Underneath the request: ``requests/attempt.py`` and ``alchemy.py`` ask a source for a session,
``engine.py`` gives the source its engine.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping
from itertools import repeat
from operator import methodcaller
from types import FunctionType
from typing import TYPE_CHECKING, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, sessionmaker

from ..errors import ConfigurationError
from .isolation import isolate
from .ledger import keep_ledger, listen
from .state import NO_OPTIONS, STATE, Ledger, SessionOptions, SessionState

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = [
    "DEFERRED",
    "AsyncSessionSource",
    "Makers",
    "OneMaker",
    "SessionOptions",
    "SessionSource",
    "SessionmakerSource",
    "is_open",
    "joined_class",
]

#: A key of the __dict__ of sessions that have not been used; its value says what they need when
#: they are.
DEFERRED = "_celery_alchemy_open"

#: Where a class of deferred sessions has the source that opens them.
_SOURCE = "_celery_alchemy_source"

#: A sessionmaker of sessions of any class.
AnyMaker = sessionmaker[Session]


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
        """The class of sessions that are opened at first use.

        ``session()`` makes one and says in DEFERRED who asks.

        None where nothing can be deferred.
        """
        ...

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return a new session that has no connection yet."""
        ...

    def opened(self, options: SessionOptions = ...) -> Session:
        """Return the same for one who is going to use it: it is not deferred.

        It has no connection yet either.
        """
        ...

    def of_class(self, class_: type[Session], asker: str) -> SessionSource:
        """Return a source of the same sessions, but of the class that a parameter asks for.

        Args:
            class_: The class; derived from the source's own, or a base of it.
            asker: The task, for messages.

        Raises:
            ConfigurationError: The classes are not related.
        """
        ...

    def engine(self) -> Engine | None:
        """Return the engine of all its sessions.

        None where no single one can be seen without asking a session.
        """
        ...


class AsyncSessionSource(Protocol):
    """Gives the AsyncSessions of ``async def`` tasks."""

    def of_class(self, class_: type[AsyncSession], asker: str) -> AsyncSessionSource:
        """Return a source of the same sessions, but of the class that a parameter asks for.

        Raises:
            ConfigurationError: The class is not related to the source's own.
        """
        ...

    def opened(self, options: SessionOptions = ...) -> AsyncSession:
        """Return a new AsyncSession; to be called in the event loop."""
        ...


def is_open(session: Session) -> bool:
    """Tell whether a session has been used at all.

    One that has not holds nothing that would need an end.
    """
    return DEFERRED not in session.__dict__


def _open_at_first_use(session: Session, name: str) -> object:
    """Run the deferred ``__init__`` and return the attribute (as ``__getattr__``).

    Python calls it for what is not there yet: before ``__init__`` has run, that is nearly
    everything.
    """
    _open(session)
    return getattr(session, name)


def _open_at_first_assignment(session: Session, name: str, value: object) -> None:
    """Run the deferred ``__init__``, and assign (as ``__setattr__``).

    Run later, it would undo the assignment.
    """
    _open(session)
    setattr(session, name, value)


def _open(session: Session) -> None:
    deferred = type(session)
    source: SessionmakerSource = getattr(deferred, _SOURCE)
    # From here on an ordinary class: Python reads every attribute of a class with __getattr__ more
    # slowly, 4 us a transaction.
    object.__setattr__(session, "__class__", source.class_)
    try:
        source.open(session, session.__dict__[DEFERRED].session_options())
    except BaseException:
        # An engine that cannot be made, for example. Without the __init__ there is nothing that the
        # end of the request could close.
        object.__setattr__(session, "__class__", deferred)
        raise
    del session.__dict__[DEFERRED]


def _open_at_first_bind(session: Session, *args: object, **kwargs: object) -> object:
    """Open first, and then ask ``get_bind``.

    A session with an isolation level then has another one, which this one could not become.
    """
    _open(session)
    bind: object = methodcaller("get_bind", *args, **kwargs)(session)
    return bind


_FIRST_USES = {
    "__init__": object.__init__,
    "get_bind": _open_at_first_bind,
    "__getattr__": _open_at_first_use,
    "__setattr__": _open_at_first_assignment,
}


def _first_reads(class_: type[Session]) -> dict[str, property]:
    """Return properties for what a class has of its own and ``__init__`` may set anew.

    Such are ``info``, or a default of the user's.

    Python finds it without ``__getattr__``. Methods, and ``dispatch`` for listeners, open the
    session by what they do.
    """
    names = (name for name in dir(class_) if not name.startswith("__") and name != "dispatch")
    values = {name: inspect.getattr_static(class_, name) for name in names}
    methods = (FunctionType, staticmethod, classmethod)
    return {
        name: _first_read(name) for name, value in values.items() if not isinstance(value, methods)
    }


def _first_read(name: str) -> property:
    return property(lambda session: _open_at_first_use(session, name))


#: Where a Session class has its subclass that keeps a ledger; on the class itself, with which it
#: ends.
_KEPT = "_celery_alchemy_kept"


def kept_class(class_: type[Session]) -> type[Session]:
    """Return a subclass of a Session class that keeps a ledger."""
    kept: type[Session] | None = class_.__dict__.get(_KEPT)
    if kept is None:
        kept = _subclass(class_, {})
        setattr(class_, _KEPT, kept)
        listen(kept)
    return kept


def _subclass(class_: type[Session], members: Mapping[str, object]) -> type[Session]:
    return type(
        class_.__name__,
        (class_,),
        {"__module__": class_.__module__, "__doc__": class_.__doc__, **members},
    )


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


def _usual_listeners(class_: type[Session]) -> tuple[object, ...]:
    """Return what the dispatchers of a class's sessions hold for the usual events.

    It is put there in advance.

    A dispatcher is made for each session, and finds each event's listeners, which are the class's,
    when it is first asked for them, through ``__getattr__``: 0.4 us for each of eleven to sixteen
    events of a transaction. To put them all there costs 1 us, which pays for what the library adds
    to a session. Listeners that come later, to the class or to one session, work as ever.
    """
    dispatch: object = class_.__new__(class_).dispatch
    return tuple(getattr(dispatch, name) for name in _USUAL_EVENTS)


class Makers(Protocol):
    """Gives the sessionmaker of this process.

    Attributes:
        maker: What ``make()`` returned in this process; None until it was called.
    """

    maker: AnyMaker | None

    def make(self) -> AnyMaker:
        """Make, keep and return it."""
        ...


class OneMaker:
    """A sessionmaker that somebody has made already."""

    def __init__(self, maker: AnyMaker) -> None:
        self.maker: AnyMaker | None = maker
        self._made = maker

    def make(self) -> AnyMaker:
        """Return it."""
        return self._made


class SessionmakerSource:
    """Sessions as a ``sessionmaker`` makes them, with its class and its options, but deferred.

    A session is handed to every task that names one in its signature, also to those that return
    before they need it. Making a Session costs 2 to 3 us and closing it 4 us; a deferred one that
    is never used costs a tenth of a microsecond.

    Args:
        makers: Gives the sessionmaker of this process.
        class_: The class of its sessions.
    """

    def __init__(self, makers: Makers, class_: type[Session] = Session) -> None:
        self._makers = makers
        self._given_class = class_
        self._of_class: dict[type[Session], SessionmakerSource] = {}
        self.class_: type[Session] = kept_class(class_)
        self.deferred_class: type[Session] = _subclass(
            self.class_, {**_first_reads(self.class_), **_FIRST_USES, _SOURCE: self}
        )
        self._listeners = _usual_listeners(self.class_)

    @property
    def maker(self) -> AnyMaker:
        """The sessionmaker of this process; its options are read anew for each session."""
        return self._makers.maker or self._makers.make()

    def engine(self) -> Engine | None:
        """Return the engine that the sessionmaker is bound to.

        None if it is bound to none, or its sessions route.
        """
        if self._given_class.get_bind is not Session.get_bind:
            return None
        bind = self.maker.kw.get("bind")
        return bind.engine if isinstance(bind, (Engine, Connection)) else None

    def of_class(self, class_: type[Session], asker: str) -> SessionmakerSource:
        """Return a source of sessions of a class, from the same sessionmaker."""
        if issubclass(self._given_class, class_):
            return self
        if class_ not in self._of_class:
            self._of_class[class_] = SessionmakerSource(
                self._makers, joined_class(class_, self._given_class, asker)
            )
        return self._of_class[class_]

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return a deferred session; nothing is connected, nothing is made before its first use."""
        session = self.deferred_class()
        session.__dict__[DEFERRED] = asks
        return session

    def opened(self, options: SessionOptions = NO_OPTIONS) -> Session:
        """Return a session whose ``__init__`` has run; for one who will use it this saves 3 us."""
        # As open() does it, for nearly every request, with two calls less.
        session = self.class_(**(self._makers.maker or self._makers.make()).kw)
        # The request ends what it does not begin: also of a sessionmaker(autobegin=False).
        session.autobegin = True
        session.__dict__[STATE] = SessionState(Ledger(options))
        if options.isolation_level is not None or options.read_only:
            isolate(session, options.isolation_level, reads_only=options.read_only)
        # setattr() for each of them, without a loop in Python.
        deque(map(setattr, repeat(session.dispatch), _USUAL_EVENTS, self._listeners), 0)
        return session

    def open(self, session: Session, options: SessionOptions) -> None:
        """Run the ``__init__`` that was deferred."""
        session.__init__(**(self._makers.maker or self._makers.make()).kw)  # type: ignore[misc]
        session.autobegin = True
        keep_ledger(session, options)


def joined_class(wanted: type, given: type, asker: str) -> type:
    """Return a class of sessions for a parameter, from which the sessionmaker's listeners hear too.

    Args:
        wanted: The class of the parameter's annotation.
        given: The ``class_`` of a sessionmaker, which derives a class of its own from the one it is
            given and listens on that; or Session or AsyncSession itself.
        asker: The task, for messages.

    Raises:
        ConfigurationError: ``wanted`` has nothing of the class that the sessionmaker was given.
    """
    if issubclass(wanted, given):
        return wanted
    told = given.__mro__[1]
    if not issubclass(wanted, told):
        raise ConfigurationError(
            f"{asker} asks for a {wanted.__module__}.{wanted.__qualname__}, and the sessionmaker"
            f" makes a {told.__module__}.{told.__qualname__}.",
            f"Give the sessionmaker class_={wanted.__qualname__}, or annotate the parameter with"
            f" {told.__qualname__}.",
        )
    return type(
        wanted.__name__,
        (wanted, given),
        {"__module__": wanted.__module__, "__doc__": wanted.__doc__},
    )
