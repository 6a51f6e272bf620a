"""Messages that are made as Celery has made them before: the same ones, and only while Celery would make them so."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.routes import Router
from celery.app.trace import build_tracer
from celery.signals import after_task_publish, before_task_publish, task_sent
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Queue

from celery_alchemy import Alchemy
from celery_alchemy.messages import templates
from celery_alchemy.messages.message import Message
from celery_alchemy.messages.recording import recording
from tests.unit.forking import in_child

Send = Callable[..., Any]


class Shop:
    """An app that never reaches a broker, and how often Celery itself has made a message."""

    def __init__(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.by_celery = 0
        initialise = templates.Templates.__init__

        def counting(own: Any, app: Any, send: Send) -> None:
            initialise(own, app, send)

            def count(*args: Any, **kwargs: Any) -> Any:
                self.by_celery += 1
                return send(*args, **kwargs)

            own._send = count

        with monkeypatch.context() as patch:
            patch.setattr(templates.Templates, "__init__", counting)
            Alchemy(app, "sqlite://")

        @app.task(name="work", shared=False)
        def work(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

        self.work: Any = work

    def message(self, **options: Any) -> Message:
        """Return the message of one send."""
        with recording(self.app) as messages:
            self.work.apply_async(**{"args": ("a",), **options})
        [message] = [one for one in messages if one.task_id is not None]  # not an event
        return message

    def made_by_celery(self, **options: Any) -> bool:
        """Tell whether Celery itself makes the message of one send."""
        before = self.by_celery
        self.message(**options)
        return self.by_celery > before

    def learn(self, **options: Any) -> None:
        """Have Celery make as many as it makes."""
        assert [self.made_by_celery(**options) for _ in range(4)] == [True, True, False, False]


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """An app with an Alchemy."""
    for signal in (before_task_publish, after_task_publish, task_sent):
        # Other tests may have had the process instrumented.
        monkeypatch.setattr(signal, "receivers", [])
    app = Celery("shop", broker="memory://", set_as_current=False)
    yield Shop(app, monkeypatch)
    app.close()


def test_third_message_is_made_without_celery(shop: Shop) -> None:
    """The first one is kept, the second one is compared."""
    shop.learn()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.tuples(
    st.lists(JSON, max_size=3).map(tuple) | st.lists(JSON, max_size=3) | st.none(),
    st.dictionaries(st.text(min_size=1), JSON, max_size=3) | st.none(),
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 9) | st.none(),
        "queue": st.sampled_from(["other", "quorum", "topic"]),
        "time_limit": st.integers(60, 90),
        "soft_time_limit": st.integers(1, 50),
        "ignore_result": st.booleans(),
        "shadow": st.sampled_from(["nick", ""]),
        "serializer": st.sampled_from(["json", "yaml"]),
        "delivery_mode": st.sampled_from([1, 2, "transient"]),
        "routing_key": st.sampled_from(["other.key"]),
        "compression": st.sampled_from(["zlib"]),
        "headers": st.just({"tenant": "acme"}),
        "countdown": st.sampled_from([0, None]),
        "retries": st.integers(0, 2),
        "link": st.none() | st.just([]),
        "add_to_parent": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    """An app with routes and queues."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.task_queues = [
        Queue("celery"),
        Queue("other"),
        Queue("quorum", queue_arguments={"x-queue-type": "quorum"}),
        Queue("topic", exchange="topics", routing_key="a.#"),
    ]
    app.conf.task_routes = {"routed.*": {"queue": "quorum", "priority": 3}}
    Alchemy(app, "sqlite://")
    for name, of_task in {"work": {}, "routed.work": {}, "set.work": {"serializer": "yaml", "time_limit": 99}}.items():

        @app.task(name=name, shared=False, typing=False, **of_task)
        def work() -> None:
            raise NotImplementedError

    yield app
    app.close()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["work", "routed.work", "set.work"]), OPTIONS, st.lists(ARGUMENTS, min_size=4, max_size=4))
def test_message_is_the_one_that_celery_makes(app: Celery, name: str, options: dict[str, Any], calls: list[Any]) -> None:
    """Whatever the options and the arguments, and however often."""

    def sent(number: int, arguments: tuple[Any, Any]) -> list[Message]:
        with recording(app) as messages:
            app.tasks[name].apply_async(*arguments, task_id=f"id-{number}", **options)
        return messages

    found = [sent(*call) for call in enumerate(calls)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "_key_of", lambda *call: None)
        expected = [sent(*call) for call in enumerate(calls)]
    assert found == expected
    assert [m.arguments for one in found for m in one] == [m.arguments for one in expected for m in one]


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": 5},
        {"expires": 5},
        {"headers": {"tenant": "acme"}},
        {"link": []},
        {"compression": "zlib"},
        {"queue": Queue("other")},
        {"argsrepr": "(hidden)"},
    ],
    ids=" ".join,
)
def test_what_differs_from_call_to_call_is_made_by_celery(shop: Shop, options: dict[str, Any]) -> None:
    """A time, headers, callbacks, objects: Celery looks at them each time."""
    assert all(shop.made_by_celery(**options) for _ in range(4))


@pytest.mark.parametrize("signal", [before_task_publish, after_task_publish], ids=["before", "after"])
def test_signals_of_publishing_are_sent(shop: Shop, signal: Any) -> None:
    """A receiver that comes later hears of the next message."""
    shop.learn()
    heard: list[Any] = []

    def hear(headers: dict[str, Any], **details: Any) -> None:
        heard.append(headers["id"])
        headers["tenant"] = "acme"  # too late for a message that is out

    signal.connect(hear)
    try:
        message = shop.message()
    finally:
        signal.disconnect(hear)

    assert heard == [message.task_id]
    assert ("tenant" in message.headers) == (signal is before_task_publish)
    assert "tenant" not in shop.message().headers


def test_event_of_the_send_is_sent_while_the_setting_says_so(shop: Shop) -> None:
    """The setting is asked for each time."""
    shop.learn()
    shop.app.conf.task_send_sent_event = True
    assert all(shop.made_by_celery() for _ in range(4))
    shop.app.conf.task_send_sent_event = False
    assert not shop.made_by_celery()


def test_settings_of_an_object_are_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Django are, which tests override."""

    class Settings:
        CELERY_TASK_DEFAULT_QUEUE = "a"

    app = Celery("shop", broker="memory://", set_as_current=False)
    app.config_from_object(Settings, namespace="CELERY")
    shop = Shop(app, monkeypatch)
    shop.learn()
    Settings.CELERY_TASK_DEFAULT_QUEUE = "b"

    assert shop.message().routing_key == "b"


def test_route_that_changes_is_asked_each_time(shop: Shop) -> None:
    """Also inside of the setting."""
    shop.app.conf.task_routes = {"work": {"queue": "a"}}
    shop.learn()
    shop.app.conf.task_routes["work"]["queue"] = "b"

    assert shop.message().routing_key == "b"


def test_queue_that_is_declared_anew_goes_with_the_message(shop: Shop) -> None:
    """It may have other arguments now."""
    shop.app.amqp.queues.add(Queue("other"))
    shop.learn(queue="other")
    shop.app.amqp.queues.add(Queue("other", queue_arguments={"x-queue-type": "quorum"}))

    [declaration] = shop.message(queue="other").declare

    assert declaration["queue_arguments"] == {"x-queue-type": "quorum"}


def test_default_queue_is_the_one_of_now(shop: Shop) -> None:
    """A setting that changes is another circumstance."""
    shop.learn()
    shop.app.conf.task_default_queue = "elsewhere"

    assert shop.message().routing_key == "elsewhere"


def test_router_of_the_applications_is_asked_each_time(shop: Shop) -> None:
    """It may look at the arguments."""

    def by_argument(name: str, args: Any, *more: Any, **options: Any) -> dict[str, Any]:
        return {"queue": args[0]}

    shop.app.conf.task_routes = [by_argument]

    assert [shop.message(args=(name,)).routing_key for name in "aabca"] == [*"aabca"]


def test_router_of_another_class_is_asked_each_time(shop: Shop) -> None:
    """It need not look at the setting."""

    class ByArgument(Router):
        def route(self, options: Any, name: Any, args: Any = (), *more: Any, **other: Any) -> Any:
            return super().route({**options, "queue": args[0]}, name, args, *more, **other)

    vars(shop.app.amqp)["router"] = ByArgument([], shop.app.amqp.queues, create_missing=True, app=shop.app)

    assert [shop.message(args=(name,)).routing_key for name in "aabca"] == [*"aabca"]


def test_task_that_is_made_anew_under_its_name_has_its_own(shop: Shop) -> None:
    """An app may replace a task."""
    shop.learn()
    shop.app.tasks.pop("work")

    def again(name: str) -> None:
        raise NotImplementedError

    shop.work = shop.app.task(name="work", shared=False, serializer="yaml")(again)

    assert shop.message().content_type == "application/x-yaml"


def test_headers_of_one_message_are_not_those_of_the_next(shop: Shop) -> None:
    """What keeps a message adds headers to it."""
    for number in range(5):
        message = shop.message()
        assert "row" not in message.headers
        message.headers["row"] = number
        message.properties["row"] = number
        message.queues.append("row")
        message.headers["timelimit"][0] = message.headers["stamps"]["row"] = number
        next_one = shop.message()
        assert (next_one.headers["timelimit"], next_one.headers["stamps"]) == ([None, None], {})
        assert "row" not in [*next_one.headers, *next_one.properties, *next_one.queues]
    assert not shop.made_by_celery()


def test_task_in_a_task_knows_its_parents(shop: Shop) -> None:
    """Who sent it, and what all began with; and its parent knows it as a child."""
    shop.learn()
    children: list[Any] = []
    headers: dict[str, Any] = {}
    properties: dict[str, Any] = {}

    @shop.app.task(name="parent", bind=True, shared=False)
    def parent(self: Task) -> None:
        message = shop.message()
        headers.update(message.headers)
        properties.update(message.properties)
        children.extend(self.request.children)

    before = shop.by_celery
    trace = build_tracer(parent.name, parent, app=shop.app)
    trace("the parent", (), {}, {"id": "the parent", "root_id": "the root", "is_eager": False, "delivery_info": {"priority": 7}})

    assert [child.id for child in children] == [headers["id"]]
    assert "priority" not in properties
    assert (headers["parent_id"], headers["root_id"]) == ("the parent", "the root")
    assert shop.by_celery == before

    shop.app.conf.task_inherit_parent_priority = True
    trace("another", (), {}, {"id": "another", "root_id": "the root", "is_eager": False, "delivery_info": {"priority": 7}})
    assert properties["priority"] == 7


def test_child_process_is_another_sender(shop: Shop) -> None:
    """Each message names the process that it comes from."""
    shop.learn()

    def names_itself() -> bool:
        return bool(shop.message().headers["origin"].startswith(f"gen{os.getpid()}@"))

    assert in_child(names_itself)


def test_app_of_a_class_that_sends_in_its_own_way_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its send_task is not Celery's."""

    class Own(Celery):
        def send_task(self, *args: Any, **options: Any) -> Any:
            return super().send_task(*args, **{**options, "priority": len(args[1][0])})

    shop = Shop(Own("own", broker="memory://", set_as_current=False), monkeypatch)

    assert [shop.message(args=("a" * length,)).priority for length in (1, 1, 1, 4)] == [1, 1, 1, 4]


@pytest.mark.parametrize("kind", ["function", "proxy"])
def test_send_task_that_is_wrapped_is_called_each_time(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Tracing libraries wrap it, some by objects that give out the class and the code of what they wrap."""
    send, traced = Celery.send_task, []

    class Proxy:
        __class__ = type(Celery("x", set_as_current=False).send_task)  # type: ignore[assignment]
        __func__ = send

        def __init__(self, app: Celery) -> None:
            self.app = app

        def __call__(self, *args: Any, **options: Any) -> Any:
            return wrapped(self.app, *args, **options)

    def wrapped(app: Celery, *args: Any, **options: Any) -> Any:
        traced.append(args)
        return send(app, *args, **options)

    monkeypatch.setattr(Celery, "send_task", wrapped if kind == "function" else property(Proxy))
    shop = Shop(Celery("shop", broker="memory://", set_as_current=False), monkeypatch)
    for _ in range(5):
        shop.message()

    assert len(traced) == 5


class OnceReadable:
    """Can be serialised once."""

    used = False

    def __json__(self) -> str:
        if self.used:
            raise ValueError("closed")
        self.used = True
        return "read"


def test_arguments_that_can_be_serialised_once_are(shop: Shop) -> None:
    """The comparison would need them a second time: it fails then, and the send does not."""
    assert [json.loads(shop.message(args=(OnceReadable(),)).body)[0] for _ in range(4)] == [["read"]] * 4


class Large(list[str]):
    """A list that a weak reference can tell of."""


def test_template_keeps_no_arguments(shop: Shop) -> None:
    """They may be large, and hold objects of the caller's."""
    large = Large(["a" * 1000])
    gone = weakref.ref(large)
    shop.message(args=(large,))
    shop.message(args=(large,))
    del large
    gc.collect()

    assert gone() is None
    assert not shop.made_by_celery(args=(["b"],))


def test_making_of_messages_that_is_replaced_is_used(shop: Shop) -> None:
    """Whoever puts another function in Celery's place has it called."""
    shop.learn()
    make = shop.app.amqp.create_task_message

    def named(*args: Any, **options: Any) -> Any:
        message = make(*args, **options)
        message.headers["made"] = "elsewhere"
        return message

    vars(shop.app.amqp)["create_task_message"] = named

    assert shop.message().headers["made"] == "elsewhere"


def test_what_celery_tells_of_each_call_anew_is_left_to_it(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that a newer Celery may add: the second message shows that the first one is no template."""
    make = shop.app.amqp.create_task_message
    made: list[str] = []

    def numbered(*args: Any, **options: Any) -> Any:
        message = make(*args, **options)
        made.append(message.headers["id"])
        message.headers["number"] = len(made)
        return message

    monkeypatch.setitem(vars(shop.app.amqp), "create_task_message", numbered)
    monkeypatch.setattr(templates, "_is_written_in", lambda module, function: True)

    assert [shop.message().headers["number"] for _ in range(5)] == [1, 2, 3, 4, 5]


def test_options_without_end_do_not_fill_the_memory(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are so many templates at most."""
    monkeypatch.setattr(templates, "_MOST", 10)
    kept: list[int] = []
    learn = templates.Templates._learn

    def noted(self: Any, *call: Any) -> Any:
        result = learn(self, *call)
        kept.append(len(self._templates))
        return result

    monkeypatch.setattr(templates.Templates, "_learn", noted)
    for seconds in range(1, 100):
        shop.message(soft_time_limit=seconds)

    assert max(kept) == 10
