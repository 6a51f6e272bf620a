"""What the library promises of its cost, measured beside what a good engineer would write by hand.

``make bench``, or ``python benchmarks/targets.py [tasks sending relay broker crowded others]``. It needs PostgreSQL, Redis and
RabbitMQ on their usual ports. All contenders of a part take turns, round after round, in one process;
a figure is the median over the rounds of the ratio inside one round, because absolute times are the
machine's. It fails when a figure is worse than its target by more than the interval of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import Any
from uuid import uuid4

import brokers
import delivery
import other_brokers
import written_by_hand
from celery.app.trace import build_tracer
from figures import Figure, take_turns

from celery_alchemy.outbox.relay import relay_of

#: Messages and tasks of one turn.
TURN = 50


# --- tasks ----------------------------------------------------------------------------------------


def tasks(rounds: int) -> list[Figure]:
    """What a session and ``once`` cost a task, in Celery's own tracer."""
    figures = {
        "untouched": Figure("session not touched, us more than a plain task", most=1.5),
        "used": Figure("session used, to `with Session(engine)`", most=1.02),
        "once": Figure("`once`, not owed, to `with Session(engine)`", most=1.2),
        "owed": Figure("`once`, owed, to `with Session(engine)`", most=1.3),
        "row": Figure("... a row by hand, without a look, for comparison"),
        "once by hand": Figure("... a look and a row by hand, for comparison"),
        "owed by hand": Figure("... an owed row by hand, started and ended, for comparison"),
        "stepped": Figure("a step, to its INSERT and COMMIT by hand", most=1.3),
    }
    with delivery.shop("redis") as made:
        bench = written_by_hand.Tasks(made)

        def turn(
            task: Any,
            *,
            owed: bool = False,
            clock: Callable[[], float],
            count: int = TURN,
            ids: list[str] | None = None,
        ) -> float:
            trace = build_tracer(task.name, task, app=bench.app)
            if ids is None:
                ids = bench.owed(task, count) if owed else [str(uuid4()) for _ in range(count)]
            start = clock()
            for task_id in ids:
                trace(task_id, (task_id,), {}, bench.request(task_id, owed=owed))
            return (clock() - start) / count * 1e6

        acts = {
            # Computed, not waited for: it has no server.
            "plain": lambda: turn(bench.plain, clock=thread_time),
            "untouched": lambda: turn(bench.untouched, clock=thread_time),
            "by hand": lambda: turn(bench.by_hand, clock=perf_counter),
            "used": lambda: turn(bench.used, clock=perf_counter),
            "row": lambda: turn(bench.row_by_hand, clock=perf_counter),
            "once by hand": lambda: turn(bench.once_by_hand, clock=perf_counter),
            "owed by hand": lambda: turn(bench.owed_by_hand, ids=bench.owed_rows(TURN), clock=perf_counter),
            "once": lambda: turn(bench.once, clock=perf_counter),
            "owed": lambda: turn(bench.once, owed=True, clock=perf_counter),
            "stepped": lambda: turn(bench.stepped, clock=perf_counter, count=2),
            "steps by hand": lambda: turn(bench.steps_by_hand, clock=perf_counter, count=2),
        }

        def note(times: dict[str, float]) -> None:
            figures["untouched"].measured.append(times["untouched"] - times["plain"])
            for name in ("used", "once", "owed", "row", "once by hand", "owed by hand"):
                figures[name].measured.append(times[name] / times["by hand"])
            figures["stepped"].measured.append(times["stepped"] / times["steps by hand"])

        take_turns(acts, rounds, note)
    return list(figures.values())


# --- sending --------------------------------------------------------------------------------------


def sending(rounds: int) -> list[Figure]:
    """Transactions that insert a row and send a task, to a commit followed by ``.delay()``."""
    return [figure for broker in ("redis", "rabbitmq") for figure in _sending(broker, rounds)]


def _sending(broker: str, rounds: int) -> list[Figure]:
    outbox = Figure(f"send through the outbox, {broker}", least=1.3)
    drained = Figure("... until the broker has all of it")
    direct = Figure(f"send on commit without an outbox, {broker}", least=1.0)
    by_hand = Figure("... a row by hand, for another process to send")
    message = Figure("... Celery's message in a row by hand, for another process to send")
    latency = Figure(f"commit to broker, ms, {broker}", most=5.0)
    with delivery.shop(broker) as made:
        bench = written_by_hand.Sending(made)

        def turn(act: Callable[[], object]) -> float:
            start = perf_counter()
            for _ in range(TURN):
                act()
            return perf_counter() - start

        def through_outbox() -> float:
            seconds = turn(bench.outbox)
            start = perf_counter()
            made.alchemy.drain(30)
            bench.after = perf_counter() - start
            return seconds

        def note(times: dict[str, float]) -> None:
            reference = times["delay"]
            outbox.measured.append(reference / times["outbox"])
            drained.measured.append(reference / (times["outbox"] + bench.after))
            direct.measured.append(reference / times["direct"])
            by_hand.measured.append(reference / times["by hand"])
            message.measured.append(reference / times["message"])

        acts = {
            "delay": lambda: turn(made.delay_after_commit),
            "outbox": through_outbox,
            "direct": lambda: turn(bench.direct),
            "by hand": lambda: turn(bench.by_hand),
            "message": lambda: turn(bench.message_by_hand),
        }
        take_turns(acts, rounds, note)
        made.empty_queue()
        latency.measured += delivery.milliseconds_to_broker(made, samples=100)["outbox"]
    return [outbox, drained, message, by_hand, direct, latency]


# --- the relay ------------------------------------------------------------------------------------


def relay(rounds: int) -> list[Figure]:
    """Rows that the relay sends, from due to settled, to ``send_task``."""
    return [_relay("redis", rounds), _relay("rabbitmq", rounds)]


def _relay(broker: str, rounds: int) -> Figure:
    confirmed = broker == "rabbitmq"
    figure = Figure(f"relay, to {'a confirmed ' if confirmed else ''}`send_task`, {broker}", least=4.0)
    with delivery.shop(broker) as made:
        relay = relay_of(made.alchemy)
        producer: Any = None
        if confirmed:
            confirming = made.app.connection_for_write(transport_options={"confirm_publish": True})
            producer = made.app.amqp.Producer(confirming, auto_declare=False)

        def send() -> float:
            start = perf_counter()
            for number in range(200):
                made.app.send_task("line", (number,), {"text": "x" * 50}, producer=producer)
            return (perf_counter() - start) / 200

        def take() -> float:
            delivery.fill(made, 1000)
            start = perf_counter()
            while relay.step():
                pass
            return (perf_counter() - start) / 1000

        take_turns(
            {"send": send, "relay": take},
            max(3, rounds // 3),
            lambda times: figure.measured.append(times["send"] / times["relay"]),
        )
    return figure


PROMISES = {"tasks": tasks, "sending": sending, "relay": relay, "broker": brokers.broker, "crowded": brokers.crowded}
#: What is measured only where it is asked for: it promises nothing.
PARTS = {**PROMISES, "others": other_brokers.others}


def main() -> int:
    """Measure the parts that were asked for, print a table, and tell whether all promises hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PROMISES), help=f"any of: {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    figures = [figure for name in arguments.parts for figure in PARTS[name](arguments.rounds)]
    delivery.table(
        "Promises",
        ["", "target", "median", "95% interval", ""],
        [figure.as_row() for figure in figures],
    )
    return 1 if any(figure.verdict == "MISSED" for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
