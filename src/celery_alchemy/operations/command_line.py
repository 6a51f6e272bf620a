"""The command line: ``celery -A app alchemy ...``, a sub-command of Celery's own.

At the edge; finds the app's Alchemy and calls what the other modules offer.
"""

from __future__ import annotations

import json
import signal
import threading

import click
from sqlalchemy.exc import DBAPIError

from ..alchemy import Alchemy
from ..broker.overview import queues_and_workers
from ..errors import CeleryAlchemyError
from ..messages.celery_types import App, Fields
from ..outbox.outbox import missing_table
from ..outbox.relay import relay_of
from ..requests.registry import home_of
from . import dead_tasks as upkeep
from .check import check

__all__ = ["alchemy"]

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


class _Sentences(click.Group):
    """Commands that say in a sentence what keeps them from their work.

    They show no traceback of it.
    """

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except CeleryAlchemyError as exc:
            raise click.ClickException(str(exc)) from exc
        except DBAPIError as exc:
            raise click.ClickException(
                str(missing_table(exc) or f"The database cannot be used: {exc.orig}")
            ) from exc


@click.group(
    name="alchemy", cls=_Sentences, help="The outbox, once tasks and the relay of celery-alchemy."
)
@click.pass_context
def alchemy(context: click.Context) -> None:
    """Find the Alchemy of the app that ``celery -A`` names."""
    app: App | None = getattr(context.obj, "app", None)
    home = None if app is None else home_of(app)
    if app is None or not isinstance(home, Alchemy):
        raise click.ClickException(
            f"The app {getattr(app, 'main', None)!r} has no Alchemy. Name the app with `celery -A"
            " module alchemy ...`."
        )
    app.finalize()
    context.meta["celery_alchemy"] = home


def _home() -> Alchemy:
    served: Alchemy = click.get_current_context().meta["celery_alchemy"]
    return served


def _print(as_json: bool, data: object, text: str) -> None:
    click.echo(json.dumps(data, default=str) if as_json else text)


@alchemy.command("create-tables")
@_JSON
def create_tables(as_json: bool) -> None:
    """Make the library's tables where they do not exist."""
    home = _home()
    home.create_tables()
    tables = sorted(home.metadata.tables)
    _print(as_json, {"tables": tables}, f"The tables {', '.join(tables)} are there.")


@alchemy.command("check")
@_JSON
def run_checks(as_json: bool) -> None:
    """Look at the app, the broker and the database; exit code 1 if a guarantee does not hold."""
    findings = check(_home())
    text = "\n".join(f"{f.level.upper():7} {f.code}: {f.reason}\n        {f.fix}" for f in findings)
    _print(as_json, [finding.as_dict() for finding in findings], text or "All is well.")
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(1)


@alchemy.command()
@_JSON
def status(as_json: bool) -> None:
    """Count what waits, is owed, completed and dead."""
    home = _home()
    counts = upkeep.status(home.engine, home.place)
    lines = [
        f"waiting    {counts['waiting']:>8}   messages that are to be sent now",
        f"leased     {counts['leased']:>8}   messages that a process is handing over",
        f"owed       {counts['owed']:>8}   once tasks that were sent and have not completed",
        f"completed  {counts['completed']:>8}   records of once tasks",
        f"dead       {counts['dead']:>8}   set aside; see `alchemy dead`",
        (
            f"oldest     {counts['oldest_seconds'] or 0:>8.0f}   seconds that the oldest waiting"
            " message is late"
        ),
    ]
    if home.is_broker:
        seen = queues_and_workers(home.engine, home.place)
        running, scheduled = (
            sum(queue[name] for queue in seen["queues"]) for name in ("taken", "scheduled")
        )
        counts = {**counts, "running": running, "scheduled": scheduled, **seen}
        lines += [
            f"running    {running:>8}   messages that a worker has taken",
            f"scheduled  {scheduled:>8}   messages in a queue that are not due yet",
        ]
        lines += ["", *_table("queue", seen["queues"]), "", *_table("name", seen["workers"])]
    _print(as_json, counts, "\n".join(lines))


def _table(first: str, rows: list[Fields]) -> list[str]:
    """Return rows of one kind as lines of a table, each beginning with its name."""
    columns = [name for name in (rows[0] if rows else {}) if name != first]
    width = max((len(str(row[first])) for row in rows), default=0)
    heading = f"{'queue' if first == 'queue' else 'worker':{width}}  " + "  ".join(columns)
    body = [
        f"{row[first]:{width}}  "
        + "  ".join(f"{_shown(row[name]):>{len(name)}}" for name in columns)
        for row in rows
    ]
    return [heading, *body] if rows else ["no queues" if first == "queue" else "no workers"]


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, float) else str(value)


@alchemy.command()
@click.option("--limit", default=100, show_default=True, help="At most so many.")
@_JSON
def dead(limit: int, as_json: bool) -> None:
    """List dead tasks with their errors."""
    home = _home()
    rows = upkeep.dead(home.engine, limit, home.place)
    _print(as_json, rows, "\n".join(map(_dead_row, rows)) or "No dead tasks.")


def _dead_row(row: Fields) -> str:
    text = f"{row['id']}  {row['task_name']}  {row['died_at']}\n    {row['error']}"
    if row["steps"]:
        text += f"\n    steps kept: {row['steps']}, the last one {row['last_step']!r}"
    return text


@alchemy.command()
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every dead task.")
@click.option("--from", "from_step", metavar="STEP", help="Forget this step and those after it.")
@click.option("--fresh", is_flag=True, help="Forget all steps.")
@_JSON
def revive(
    ids: tuple[str, ...], everything: bool, from_step: str | None, fresh: bool, as_json: bool
) -> None:
    """Send dead tasks again, by their ids or all of them.

    Each goes on after its last recorded step.
    """
    if bool(ids) == everything:
        raise click.UsageError("Name dead tasks by their ids, or give --all.")
    if fresh and from_step is not None:
        raise click.UsageError("Give --from STEP or --fresh, not both.")
    home = _home()
    revived = upkeep.revive(
        home.engine, None if everything else ids, home.place, from_step=from_step, fresh=fresh
    )
    _print(
        as_json,
        {"revived": revived},
        f"{revived} revived; a relay sends them." if revived else "0 revived.",
    )
    if ids and revived < len(ids):
        raise click.ClickException(
            f"{len(ids) - revived} of the ids are not those of dead tasks with a message."
        )


@alchemy.command()
@_JSON
def prune(as_json: bool) -> None:
    """Delete completion records that are older than the once window, and expired results."""
    home = _home()
    deleted = upkeep.prune_all(home.engine, home.once_window_seconds, home.place)
    _print(as_json, {"deleted": deleted}, f"{deleted} deleted.")


@alchemy.command()
@click.option("--once", "one_pass", is_flag=True, help="Send what is due and end.")
@_JSON
def relay(one_pass: bool, as_json: bool) -> None:
    """Send what the outbox holds, until stopped."""
    home = _home()
    worker = relay_of(home)
    if one_pass:
        sent = 0
        while claimed := worker.step():
            sent += claimed
        _print(as_json, {"handled": sent}, f"{sent} handled.")
        return
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    click.echo("The relay runs.")
    worker.run(stopping, home.relay_interval_seconds)
