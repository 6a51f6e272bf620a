"""Which parameters of a task's body are sessions, and how they are filled without the caller knowing.

Read once when a task is made (``task.py``); the result is a plan that costs one function call per request.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from celery.utils.functional import head_from_fun
from sqlalchemy.orm import Session

from .entities import EntityParameter, entity_parameters
from .errors import SessionParameterError

__all__ = ["Body", "Injection", "SessionParameter", "caller_header", "injection_of", "without_placeholders"]

Body = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class SessionParameter:
    """A parameter that is injected.

    Attributes:
        name: Its name in the signature.
        index: Its place among the positional parameters, ``self`` of a bound task not counted; None if it is keyword-only.
        database: The name of the Alchemy it asks for, from ``Annotated[Session, "name"]``; None for the app's default.
        class_: The subclass of Session or AsyncSession that it is annotated with; None for one of these two.
    """

    name: str
    index: int | None
    database: str | None = None
    class_: type[Any] | None = None


@dataclass(frozen=True, slots=True)
class Injection:
    """How to call a body: its session parameters, and the signature that callers see.

    Attributes:
        parameters: The injected parameters in the order of the signature.
        signature: The signature without them, and without ``self``.
        entities: The parameters that are annotated with mapped classes.
    """

    parameters: tuple[SessionParameter, ...]
    signature: inspect.Signature
    entities: tuple[EntityParameter, ...] = ()

    def fill(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sessions: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the sessions in their places.

        Args:
            args: Positional arguments as the caller gave them.
            kwargs: Keyword arguments as the caller gave them.
            sessions: The session for each parameter name.
        """
        filled = dict(kwargs)
        for parameter in self.parameters:
            value = sessions[parameter.name]
            if parameter.index is not None and len(args) >= parameter.index:
                args = (*args[: parameter.index], value, *args[parameter.index :])
            else:
                filled[parameter.name] = value
        return args, filled

    def session_class(self, database: str | None, *, named: bool) -> type[Any] | None:
        """Return the subclass of which a database's session shall be; None if any will do.

        Args:
            database: Its name; None for the app's default.
            named: The text in ``Annotated[Session, "text"]`` is a name, and no comment.
        """
        asking = (p for p in self.parameters if (p.database if named else None) == database)
        return next((parameter.class_ for parameter in asking), None)

    def given(self, kwargs: Mapping[str, Any]) -> str | None:
        """Return the name of a session parameter that the caller passed, None if it passed none."""
        for parameter in self.parameters:
            if parameter.name in kwargs:
                return parameter.name
        return None


def injection_of(body: Body, *, bound: bool, task_name: str) -> Injection:
    """Find the session parameters of a task's body.

    Args:
        body: The function that the user wrote, or a wrapper with ``__wrapped__`` around it.
        bound: Its first parameter is the task.
        task_name: For messages.

    Raises:
        SessionParameterError: Two parameters ask for a session, an annotation that may be a session cannot be resolved, or
            a session is asked for in ``*args`` or ``**kwargs``.
    """
    signature = inspect.signature(body)
    parameters = list(signature.parameters.values())
    if bound and parameters:
        parameters = parameters[1:]
    hints = _hints(body)
    is_async = inspect.iscoroutinefunction(inspect.unwrap(body))
    found: list[SessionParameter] = []
    for index, parameter in enumerate(parameters):
        annotation = hints.get(parameter.name, parameter.annotation)
        class_ = _session_class(annotation, parameter.name, task_name)
        if class_ is None:
            continue
        kind: Literal["Session", "AsyncSession"] = "Session" if issubclass(class_, Session) else "AsyncSession"
        _refuse_wrong_kind(kind, parameter.name, task_name, is_async=is_async)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise SessionParameterError(
                f"Task {task_name!r} asks for sessions in {parameter}.", "Name one parameter for one session."
            )
        keyword_only = parameter.kind is parameter.KEYWORD_ONLY
        place = None if keyword_only else index
        subclass = None if class_.__module__.startswith("sqlalchemy.") else class_
        found.append(SessionParameter(parameter.name, place, _database_of(annotation), subclass))
    _refuse_twins(found, task_name)
    names = {p.name for p in found}
    visible = signature.replace(parameters=[p for p in parameters if p.name not in names])
    return Injection(tuple(found), visible, entity_parameters(visible, hints))


def _refuse_twins(found: list[SessionParameter], task_name: str) -> None:
    seen: dict[str | None, str] = {}
    for parameter in found:
        if parameter.database in seen:
            raise SessionParameterError(
                f"Task {task_name!r} asks twice for the same session, as {seen[parameter.database]!r} and as {parameter.name!r}.",
                "Keep one; for a second database name its Alchemy: Annotated[Session, 'analytics'].",
            )
        seen[parameter.database] = parameter.name


def _database_of(annotation: Any) -> str | None:
    """Return the name in ``Annotated[Session, "name"]``."""
    annotation = _stands_for(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = _stands_for(next(member for member in get_args(annotation) if member is not type(None)))
    if get_origin(annotation) is not Annotated:
        return None
    return next((extra for extra in get_args(annotation)[1:] if isinstance(extra, str)), None)


def _stands_for(annotation: Any) -> Any:
    """Return what a name stands for: that of a ``type`` statement, of a NewType, or of a type variable with a bound."""
    while True:
        if type(annotation).__name__ == "TypeAliasType":  # From Python 3.12 on; typing_extensions has one for older ones.
            annotation = annotation.__value__
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif isinstance(annotation, typing.TypeVar) and annotation.__bound__ is not None:
            annotation = annotation.__bound__
        else:
            return annotation


def _hints(body: Body) -> dict[str, Any]:
    """Resolve annotations, each by itself: one that needs a TYPE_CHECKING import must not hide the others."""
    function: Any = inspect.unwrap(body)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = type(function).__call__
    hints = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        alone = types.FunctionType((lambda: None).__code__, getattr(function, "__globals__", {}))
        alone.__annotations__ = {name: annotation}
        try:
            hints.update(typing.get_type_hints(alone, include_extras=True))
        except Exception:  # noqa: BLE001 - as above; what is unresolved is judged by its text below.
            hints[name] = annotation
    return hints


def _session_class(annotation: Any, name: str, task_name: str) -> type[Any] | None:
    """Return the class of session that an annotation asks for, None if for none."""
    annotation = _stands_for(annotation)
    if isinstance(annotation, str):
        text = annotation.split("[")[0].split(".")[-1].strip()
        # A name such as ShopSession may be anything; of a parameter named session it is hardly the caller's to give.
        if text in ("Session", "AsyncSession") or (name == "session" and text.endswith("Session")):
            raise SessionParameterError(
                f"The annotation {annotation!r} of parameter {name!r} of task {task_name!r} cannot be resolved at run time.",
                "Import the class outside of `if TYPE_CHECKING:` (with ruff, list it in runtime-evaluated names); with"
                " `from __future__ import annotations` it cannot be a function's local name.",
            )
        return None
    if get_origin(annotation) is Annotated:
        annotation = _stands_for(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        return _session_class(members[0], name, task_name) if len(members) == 1 else None
    if not isinstance(annotation, type):
        return None
    return annotation if issubclass(annotation, Session) or is_async_session_class(annotation) else None


def is_async_session_class(class_: type) -> bool:
    """Tell whether a class is AsyncSession or derived from it, without importing SQLAlchemy's asyncio extension."""
    return any(base.__name__ == "AsyncSession" and base.__module__.startswith("sqlalchemy.ext.asyncio") for base in class_.__mro__)


def _refuse_wrong_kind(kind: str, name: str, task_name: str, *, is_async: bool) -> None:
    if kind == "Session" and is_async:
        raise SessionParameterError(
            f"Task {task_name!r} is an `async def` and asks for a Session as {name!r}, which would block the event loop.",
            "Annotate it with AsyncSession, or make the task a plain `def`.",
        )
    if kind == "AsyncSession" and not is_async:
        raise SessionParameterError(
            f"Task {task_name!r} is a plain `def` and asks for an AsyncSession as {name!r}, which it cannot await.",
            "Annotate it with Session, or make the task an `async def`.",
        )


def caller_header(body: Body, injection: Injection) -> Callable[..., object] | None:
    """Return the function with which Celery checks a caller's arguments, without the injected parameters.

    None when Celery's own check is right: for a wrapper that takes ``*args, **kwargs`` it checks nothing.
    """
    visible = inspect.getfullargspec(body)
    names = {*visible.args, *visible.kwonlyargs}
    if not any(parameter.name in names for parameter in injection.parameters):
        return None

    def stand_in() -> None: ...

    stand_in.__name__ = getattr(body, "__name__", "task")
    stand_in.__module__ = getattr(body, "__module__", __name__)
    # head_from_fun() writes source code from it, in which annotations would only be in the way.
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in injection.signature.parameters.values()]
    stand_in.__signature__ = inspect.Signature(bare)  # type: ignore[attr-defined]
    return typing.cast("Callable[..., object]", head_from_fun(stand_in))


def without_placeholders(dump: Callable[..., Any], injection: Injection) -> Callable[..., Any]:
    """Let Celery's pydantic dump, which binds arguments to the whole signature, see something in the sessions' places."""
    placeholder = object()

    def dump_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
        places = {parameter.name: placeholder for parameter in injection.parameters}
        filled_args, filled_kwargs = injection.fill(tuple(args or ()), kwargs or {}, places)
        dumped_args, dumped_kwargs = dump(filled_args, filled_kwargs)
        return (
            tuple(value for value in dumped_args if value is not placeholder),
            {key: value for key, value in dumped_kwargs.items() if value is not placeholder},
        )

    return dump_arguments
