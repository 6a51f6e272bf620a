"""Which parameters of a task's body are sessions, and how they are filled.

The caller does not know of them.

Read once when a task is made (``task.py``); the result is a plan that costs one function call per
request.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from celery.utils.functional import head_from_fun
from sqlalchemy.orm import Session

from ..errors import SessionParameterError
from ..sessions.coroutine_functions import is_coroutine_function, runs_what_it_wraps
from .entities import EntityParameter, entity_parameters
from .unresolved import IMPORT_IT, classes_in, text_of, unresolved_parameters
from .wrappers import Parameters, parameters_of

__all__ = [
    "Body",
    "Injection",
    "SessionParameter",
    "caller_header",
    "hints_of",
    "injection_of",
    "is_async_session_class",
    "without_placeholders",
]

Body = Callable[..., object]

_Filled = tuple[tuple[object, ...], dict[str, object]]

#: Makes plain values of arguments, as Celery does for bodies with pydantic's models.
DumpArguments = Callable[[Iterable[object] | None, Mapping[str, object] | None], _Filled]


@dataclass(frozen=True, slots=True)
class SessionParameter:
    """A parameter that is injected.

    Attributes:
        name: Its name in the signature.
        index: Its place among the positional parameters, ``self`` of a bound task not counted; None
            if it is keyword-only.
        class_: The subclass of Session or AsyncSession that it is annotated with; None for one of
            these two.
        named: The positional parameters from that place on that are given by name, as the session
            is: behind what a decorator takes for itself. None where they are given by place.
        defaults: Of a session that can only be given by place, the defaults of those before it.
    """

    name: str
    index: int | None
    class_: type | None = None
    named: tuple[str, ...] | None = None
    defaults: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Injection:
    """How to call a body: its session parameter, and the signature that callers see.

    Attributes:
        session: The injected parameter; None for a body that asks for no session.
        signature: The signature without it, and without ``self``.
        entities: The parameters that are annotated with mapped classes.
        unresolved: The parameters whose annotation cannot be resolved at run time.
        is_async: The body is to be awaited: a coroutine function, which no decorator runs by
            itself.
    """

    session: SessionParameter | None
    signature: inspect.Signature
    entities: tuple[EntityParameter, ...] = ()
    unresolved: tuple[EntityParameter, ...] = ()
    is_async: bool = False

    @property
    def asks(self) -> bool:
        """Tell whether anything is done with the arguments of a call."""
        return self.session is not None or bool(self.entities or self.unresolved)

    def fill(
        self, args: tuple[object, ...], kwargs: Mapping[str, object], session: object
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the arguments with the session in its place.

        Args:
            args: Positional arguments as the caller gave them.
            kwargs: Keyword arguments as the caller gave them.
            session: What the parameter gets.
        """
        filled = dict(kwargs)
        asked = self.session
        if asked is None:
            return args, filled
        index = asked.index
        if asked.named is not None:
            args = _by_name(args, filled, index, asked.named)
        elif index is not None:
            if len(args) < index <= len(args) + len(asked.defaults):
                args = (*args, *asked.defaults[len(args) - index :])
            if len(args) >= index:
                return (*args[:index], session, *args[index:]), filled
        filled[asked.name] = session
        return args, filled

    def is_given(self, kwargs: Mapping[str, object]) -> bool:
        """Tell whether the caller passed the session."""
        return self.session is not None and self.session.name in kwargs


def _by_name(
    args: tuple[object, ...], filled: dict[str, object], index: int | None, named: tuple[str, ...]
) -> tuple[object, ...]:
    """Move the arguments from a place on among those by name; return what is left.

    Too many, or one that is there by name too, stay for Python to refuse.
    """
    moved = args[index:]
    if len(moved) > len(named) or not filled.keys().isdisjoint(named[: len(moved)]):
        return args
    filled.update(zip(named, moved, strict=False))
    return args[:index]


def injection_of(body: Body, *, bound: bool, task_name: str) -> Injection:
    """Find the session parameter of a task's body.

    Args:
        body: The function that the user wrote, or a wrapper with ``__wrapped__`` around it.
        bound: Its first parameter is the task.
        task_name: For messages.

    Raises:
        SessionParameterError: Two parameters ask for a session, an annotation that may be a session
            cannot be resolved, a session is asked for in ``*args`` or ``**kwargs``, or a decorator
            leaves no way to give it.
    """
    seen = parameters_of(body, bound=bound)
    parameters = list(seen.all)
    hints = hints_of(body)
    is_coroutine = is_coroutine_function(inspect.unwrap(body))
    is_async = is_coroutine and not runs_what_it_wraps(body)
    found: list[SessionParameter] = []
    for index, parameter in enumerate(parameters):
        annotation = hints.get(parameter.name, parameter.annotation)
        class_ = _session_class(annotation, parameter.name, task_name)
        if class_ is None:
            continue
        kind: Literal["Session", "AsyncSession"] = (
            "Session" if issubclass(class_, Session) else "AsyncSession"
        )
        if kind == "AsyncSession":
            # It is of the loop in which it is awaited, and not of a decorator's own.
            is_async = is_coroutine
        _refuse_wrong_kind(kind, parameter.name, task_name, is_async=is_async)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise SessionParameterError(
                f"Task {task_name!r} asks for sessions in {parameter}.",
                "Name one parameter for one session.",
            )
        subclass = None if class_.__module__.startswith("sqlalchemy.") else class_
        found.append(_placed(seen, index, subclass, task_name))
    _refuse_twins(found, task_name)
    asked = found[0] if found else None
    visible = inspect.signature(body).replace(
        parameters=[p for p in parameters if asked is None or p.name != asked.name]
    )
    return Injection(
        asked,
        visible,
        entity_parameters(visible, hints),
        unresolved_parameters(visible, hints),
        is_async,
    )


def _placed(
    seen: Parameters, index: int, subclass: type | None, task_name: str
) -> SessionParameter:
    """Return how the session is given that is asked for at a place.

    Raises:
        SessionParameterError: It stands behind a decorator's own parameters, and cannot be given by
            name.
    """
    parameter, before = seen.all[index], seen.all[:index]
    if parameter.kind is parameter.KEYWORD_ONLY:
        return SessionParameter(parameter.name, None, subclass)
    if parameter.name not in seen.behind:
        defaults = [one.default for one in before if one.default is not one.empty]
        only_by_place = parameter.kind is parameter.POSITIONAL_ONLY
        return SessionParameter(
            parameter.name, index, subclass, None, tuple(defaults) if only_by_place else ()
        )
    if seen.takers or parameter.kind is parameter.POSITIONAL_ONLY:
        raise SessionParameterError(
            f"Task {task_name!r} asks for a session as {parameter.name!r}, and a decorator around"
            f" it takes {', '.join(map(repr, seen.takers or (before[0].name,)))} and hands on no"
            " arguments by name: where the session stands for it cannot be known.",
            "Give the decorator's function **kwargs and hand them on, and let the session be given"
            " by name.",
        )
    named = [one.name for one in seen.all[index + 1 :] if one.kind is one.POSITIONAL_OR_KEYWORD]
    return SessionParameter(parameter.name, index, subclass, tuple(named))


def _refuse_twins(found: list[SessionParameter], task_name: str) -> None:
    if len(found) > 1:
        raise SessionParameterError(
            f"Task {task_name!r} asks twice for its session, as {found[0].name!r} and as"
            f" {found[1].name!r}.",
            "Keep one; for another database use its Alchemy in the body: with analytics.begin() as"
            " facts.",
        )


def _stands_for(annotation: Any) -> object:
    """Return what a name stands for.

    It may be of a ``type`` statement, of a NewType, or of a type variable with a bound.
    """
    while True:
        # From Python 3.12 on; typing_extensions has one for older ones.
        if type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif isinstance(annotation, typing.TypeVar) and annotation.__bound__ is not None:
            annotation = annotation.__bound__
        else:
            return annotation


def hints_of(body: Body) -> dict[str, object]:
    """Resolve annotations, each by itself.

    One that needs a TYPE_CHECKING import must not hide the others.
    """
    function: object = inspect.unwrap(body)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = type(function).__call__
    hints = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.FunctionType((lambda: None).__code__, getattr(function, "__globals__", {}))
        alone.__annotations__ = {name: annotation}
        try:
            hints.update(typing.get_type_hints(alone, include_extras=True))
        except Exception:  # noqa: BLE001 - judged by its text below.
            hints[name] = annotation
    return hints


def _session_class(annotation: object, name: str, task_name: str) -> type | None:
    """Return the class of session that an annotation asks for, None if for none."""
    annotation = _stands_for(annotation)
    text = text_of(annotation)
    if text is not None:
        # A name such as ShopSession may be anything; of a parameter named session it is hardly the
        # caller's to give.
        if any(
            asked in ("Session", "AsyncSession")
            or (name == "session" and asked.endswith("Session"))
            for asked in classes_in(text)
        ):
            raise SessionParameterError(
                f"The annotation {text!r} of parameter {name!r} of task {task_name!r} cannot be"
                " resolved at run time.",
                IMPORT_IT,
            )
        return None
    if get_origin(annotation) is Annotated:
        return _session_class(get_args(annotation)[0], name, task_name)
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        return _session_class(members[0], name, task_name) if len(members) == 1 else None
    if not isinstance(annotation, type):
        return None
    return (
        annotation
        if issubclass(annotation, Session) or is_async_session_class(annotation)
        else None
    )


def is_async_session_class(class_: type) -> bool:
    """Tell whether a class is AsyncSession or derived from it.

    SQLAlchemy's asyncio extension is not imported for that.
    """
    return any(
        base.__name__ == "AsyncSession" and base.__module__.startswith("sqlalchemy.ext.asyncio")
        for base in class_.__mro__
    )


def _refuse_wrong_kind(kind: str, name: str, task_name: str, *, is_async: bool) -> None:
    if kind == "Session" and is_async:
        raise SessionParameterError(
            f"Task {task_name!r} is an `async def` and asks for a Session as {name!r}, which would"
            " block the event loop.",
            "Annotate it with AsyncSession, or make the task a plain `def`.",
        )
    if kind == "AsyncSession" and not is_async:
        raise SessionParameterError(
            f"Task {task_name!r} is a plain `def` and asks for an AsyncSession as {name!r}, which"
            " it cannot await.",
            "Annotate it with Session, or make the task an `async def`.",
        )


def caller_header(body: Body, injection: Injection) -> Callable[..., object] | None:
    """Return the function with which Celery checks a caller's arguments, without the injected one.

    None when Celery's own check is right: for a wrapper that takes ``*args, **kwargs`` it checks
    nothing.
    """
    visible = inspect.getfullargspec(body)
    names = {*visible.args, *visible.kwonlyargs}
    if injection.session is None or injection.session.name not in names:
        return None

    def stand_in() -> None: ...

    stand_in.__name__ = getattr(body, "__name__", "task")
    stand_in.__module__ = getattr(body, "__module__", __name__)
    # head_from_fun() writes source code from it, in which annotations would only be in the way.
    bare = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in injection.signature.parameters.values()
    ]
    stand_in.__signature__ = inspect.Signature(bare)  # type: ignore[attr-defined]
    return head_from_fun(stand_in)


def without_placeholders(dump: DumpArguments, injection: Injection) -> DumpArguments:
    """Let Celery's pydantic dump see something in the session's place.

    It binds arguments to the whole signature.
    """
    placeholder = object()

    def dump_arguments(
        args: Iterable[object] | None, kwargs: Mapping[str, object] | None
    ) -> _Filled:
        filled_args, filled_kwargs = injection.fill(tuple(args or ()), kwargs or {}, placeholder)
        dumped_args, dumped_kwargs = dump(filled_args, filled_kwargs)
        return (
            tuple(value for value in dumped_args if value is not placeholder),
            {key: value for key, value in dumped_kwargs.items() if value is not placeholder},
        )

    return dump_arguments
