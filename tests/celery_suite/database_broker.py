"""A pytest plugin for Celery's tests: they can name the database as their broker and as their result backend."""

from __future__ import annotations

import pytest
from celery.app.backends import BACKEND_ALIASES

from celery_alchemy.broker import SCHEME, make_known

#: Many tests note in Redis what their tasks did, and are skipped unless the URL of the result backend begins with `redis`.
BACKEND_SCHEME = f"redis_beside_{SCHEME}"

#: Left out: tests of one other broker or result backend alone.
OF_OTHERS = [
    # It leaves out a Redis broker itself: it publishes with a Python object among the properties, which AMQP alone passes over.
    "t/integration/test_canvas.py::test_chain::test_chord_header_id_duplicated_on_rabbitmq_msg_duplication",
    # It reads the results of a chord's parts out of the Redis key that Celery's own backend keeps them in.
    "t/integration/test_canvas.py::test_chord::test_chord_on_error",
    # Celery's issue 6437: the tasks of a group after a failed task never end. It is marked as failing on Redis.
    "t/integration/test_canvas.py::test_chord::test_error_propagates_from_chord",
    # It looks for tasks with an eta in the memory of a worker. Here they are rows until they are due.
    "t/integration/test_inspect.py::test_Inspect::test_scheduled",
    # They count the channels that Redis clients subscribe to.
    "t/integration/test_canvas.py::test_chord::test_redis_subscribed_channels_leak",
    "t/integration/test_tasks.py::test_task_redis_result_backend::test_asyncresult_forget_cancels_subscription",
    "t/integration/test_tasks.py::test_task_redis_result_backend::test_asyncresult_get_cancels_subscription",
]

make_known()
BACKEND_ALIASES[BACKEND_SCHEME] = BACKEND_ALIASES[SCHEME]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is about others."""
    items[:] = [item for item in items if item.nodeid.partition("[")[0] not in OF_OTHERS]
