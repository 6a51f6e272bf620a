"""What sending on commit and ``once`` cost, beside plain Celery, procrastinate and DBOS.

``python benchmarks/delivery.py [latency enqueue relay drain statements]``. It needs PostgreSQL, Redis and RabbitMQ on their usual
ports, and makes and drops the database ``celery_alchemy_delivery``. All contenders of a part are measured in turn, round after
round, in one run; what is compared are ratios inside one round, because absolute times are the machine's.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles
from time import monotonic, perf_counter, process_time, sleep
from typing import Any

import durable
import rivals
from celery import Celery
from celery.app.trace import build_tracer
from kombu import Consumer, Queue
from sqlalchemy import event, update
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.databases.tables import from_now, outbox
from celery_alchemy.messages.recording import recording
from celery_alchemy.outbox.outbox import Row, unique_id
from celery_alchemy.outbox.relay import relay_of

BROKERS = {
    "redis": "redis://127.0.0.1:6379/9",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:5672//",
    "filesystem": "filesystem://",
}


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


@contextmanager
def shop(broker: str) -> Iterator[rivals.Shop]:
    """An app with an outbox on an empty database and an empty queue."""
    folder = tempfile.mkdtemp()
    made = rivals.Shop(BROKERS[broker], folder)
    made.create_tables()
    try:
        yield made
    finally:
        made.empty_queue()
        made.close()
        shutil.rmtree(folder)


# --- from commit to broker ----------------------------------------------------------------------------------


class Arrivals:
    """Receives messages in a thread and notes when each one came."""

    def __init__(self, app: Celery) -> None:
        self.times: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._receive, args=(app,), daemon=True)
        self._thread.start()

    def _receive(self, app: Celery) -> None:
        with app.connection_for_read() as connection:
            queue = Queue(app.conf.task_default_queue, durable=True)
            with Consumer(connection, [queue], on_message=self._note, no_ack=True):
                while not self._ended.is_set():
                    try:
                        connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    def _note(self, message: Any) -> None:
        self.times[message.headers["id"]] = perf_counter()

    def of(self, task_id: str) -> float:
        """Return when a message came."""
        deadline = monotonic() + 10
        while task_id not in self.times:
            if monotonic() > deadline:
                raise TimeoutError(f"message {task_id} did not come")
            sleep(0.0005)
        return self.times[task_id]

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()


def milliseconds_to_broker(made: rivals.Shop, samples: int) -> dict[str, list[float]]:
    """From the end of COMMIT to the arrival at a consumer, one message after the other."""
    arrivals = Arrivals(made.app)
    committed: list[float] = []
    session = Session(made.engine)
    event.listen(session, "after_commit", lambda _, c=committed: c.append(perf_counter()))
    spent: dict[str, list[float]] = {"delay": [], "outbox": []}
    for number in range(samples + 20):
        for name, taken in spent.items():
            committed.clear()
            session.execute(rivals.ADD_LINE)
            if name == "outbox":
                task_id = enqueue(session, made.line.s()).id
                session.commit()
            else:
                session.commit()
                task_id = made.line.delay().id
            came = arrivals.of(task_id)
            if number >= 20:
                taken.append((came - committed[0]) * 1000)
    session.close()
    arrivals.close()
    return spent


def latency(samples: int = 300) -> None:
    """From the end of COMMIT to the arrival at a consumer: ``.delay()`` after the commit, and the outbox."""
    rows = []
    for broker in ("redis", "rabbitmq"):
        with shop(broker) as made:
            spent = milliseconds_to_broker(made, samples)
        rows += [[f"{broker}, {name}", f"{median(taken):.2f}", f"{quantiles(taken, n=100)[98]:.2f}"] for name, taken in spent.items()]
        ratio = median(o / d for o, d in zip(spent["outbox"], spent["delay"], strict=True))
        rows.append([f"{broker}, outbox : delay", f"{ratio:.2f}", ""])
    table("Commit to broker, ms", ["", "median", "p99"], rows)


# --- enqueueing ---------------------------------------------------------------------------------------------


def compare(title: str, contenders: dict[str, Callable[[], float]], reference: str, rounds: int) -> None:
    """Take turns, and print the rates and their ratio to the reference's of the same round."""
    for run in contenders.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            rates[name].append(run())
    rows = []
    for name, own in rates.items():
        ratios = [mine / theirs for mine, theirs in zip(own, rates[reference], strict=True)]
        rows.append([name, f"{median(own):.0f}", f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    table(title, ["", "per second", "ratio", "range"], rows)


def enqueueing(count: int = 200, rounds: int = 7) -> None:
    """Transactions with one INSERT and one send."""
    with shop("redis") as made, rivals.procrastinate_app() as jobs, durable.dbos_client(made.engine) as client:

        def timed(act: Callable[[], object]) -> Callable[[], float]:
            def run() -> float:
                start = perf_counter()
                for _ in range(count):
                    act()
                rate = count / (perf_counter() - start)
                made.empty_queue()
                return rate

            return run

        contenders = {
            "commit, then .delay()": timed(made.delay_after_commit),
            "outbox": timed(made.enqueue),
            "outbox, ten sends": timed(lambda: made.enqueue(10)),
            "ten .delay() after commit": timed(lambda: made.delay_after_commit(10)),
            "procrastinate, in the transaction": timed(lambda: rivals.defer(made.engine, jobs)),
            "DBOS, in the transaction": timed(lambda: durable.send(made.engine, client, durable.UNLIMITED)),
        }
        compare("Transactions with an INSERT and a send (Redis)", contenders, "commit, then .delay()", rounds)


# --- the relay ----------------------------------------------------------------------------------------------


def relaying(count: int = 2000, rounds: int = 7) -> None:
    """The relay, from due rows to a settled outbox, against ``send_task``: as it is, and with confirms where the broker has them."""
    for broker in BROKERS:
        with shop(broker) as made:
            relay = relay_of(made.alchemy)
            computed: dict[str, list[float]] = {"send_task": [], "relay": []}

            def send(made: rivals.Shop = made, computed: Any = computed, producer: Any = None) -> float:
                start, cpu = perf_counter(), process_time()
                for number in range(count // 4):
                    made.app.send_task("line", (number,), {"text": "x" * 50}, producer=producer)
                if producer is None:
                    computed["send_task"].append((process_time() - cpu) / (count // 4))
                rate = count // 4 / (perf_counter() - start)
                made.empty_queue()
                return rate

            def drain(made: rivals.Shop = made, relay: Any = relay, computed: Any = computed) -> float:
                fill(made, count)
                start, cpu, done = perf_counter(), process_time(), 0
                while claimed := relay.step():
                    done += claimed
                if done != count:
                    raise RuntimeError(f"{done} of {count} were claimed")
                computed["relay"].append((process_time() - cpu) / count)
                rate = count / (perf_counter() - start)
                made.empty_queue()
                return rate

            contenders: dict[str, Callable[[], float]] = {"send_task": send, "relay": drain}
            if broker == "rabbitmq":
                confirming = made.app.connection_for_write(transport_options={"confirm_publish": True})
                producer = made.app.amqp.Producer(confirming, auto_declare=False)
                contenders["send_task, confirmed"] = partial(send, producer=producer)
            compare(f"Messages to {broker}", contenders, "send_task", rounds)
            ratio = median(computed["send_task"]) / median(computed["relay"])
            print(f"\nProcessor time of this process for one message: send_task {ratio:.2f} times the relay's.")


def fill(made: rivals.Shop, count: int) -> None:
    """Write messages to the outbox whose lease is over."""
    with recording(made.app) as messages:
        for number in range(count):
            made.app.send_task("line", (number,), {"text": "x" * 50})
    with Session(made.engine) as session:
        made.alchemy.outbox.write(session, [Row(unique_id(), message) for message in messages], "gone")
        session.execute(update(outbox).values(due_at=from_now(-1), claim=None))
        session.commit()


# --- workers ------------------------------------------------------------------------------------------------


def draining(count: int = 300, rounds: int = 3) -> None:
    """One worker process with one child, tasks that insert one row: from the first row to the last."""
    with shop("redis") as made, rivals.procrastinate_app() as jobs, durable.dbos_client(made.engine) as client:

        def by_celery(task: Any) -> Callable[[], float]:
            def run() -> float:
                with Session(made.engine) as session:
                    for _ in range(count):
                        enqueue(session, task.s())
                    session.commit()
                return made.rate_of(rivals.CELERY_WORKER, count)

            return run

        def by_procrastinate() -> float:
            for _ in range(count):
                rivals.defer(made.engine, jobs, with_row=False)
            return made.rate_of(rivals.PROCRASTINATE_WORKER, count)

        def by_dbos(queue: str) -> Callable[[], float]:
            def run() -> float:
                for _ in range(count):
                    durable.send(made.engine, client, queue, with_row=False)
                return made.rate_of(durable.WORKER, count)

            return run

        contenders = {
            "plain task": by_celery(made.line),
            "once": by_celery(made.line_once),
            "procrastinate": by_procrastinate,
            "DBOS, one at a time": by_dbos(durable.ONE_AT_A_TIME),
            "DBOS, all at once": by_dbos(durable.UNLIMITED),
        }
        compare("Tasks of a worker with one process (Redis, PostgreSQL)", contenders, "plain task", rounds)


def statements() -> None:
    """Statements of one task with one INSERT, counted."""
    rows = []
    with shop("redis") as made:
        seen: list[str] = []
        event.listen(made.engine, "before_cursor_execute", lambda *a: seen.append(a[2]))
        for task in (made.line, made.line_once):
            with Session(made.engine) as session:
                enqueue(session, task.s())
                seen.clear()
                session.commit()
            sending = list(seen)
            task_id, headers = made.take_message()
            seen.clear()
            request = {**headers, "args": (), "kwargs": {}, "is_eager": False, "delivery_info": {}}
            build_tracer(task.name, task, app=made.app)(task_id, (), {}, request)
            rows.append([task.name, str(len(sending)), str(len(seen))])
    table("Statements", ["", "commit of the sender, with hand-over", "task with one INSERT"], rows)


PARTS = {
    "latency": latency,
    "enqueue": enqueueing,
    "relay": relaying,
    "drain": draining,
    "statements": statements,
}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"any of: {', '.join(PARTS)}")
    for name in parser.parse_args().parts:
        PARTS[name]()


if __name__ == "__main__":
    main()
