"""Dead tasks with steps: shown, revived where they stopped, from an earlier step, or afresh; and what prune takes away."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, step
from celery_alchemy.operations import dead_tasks
from celery_alchemy.operations.command_line import alchemy as command
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.steps.test_steps import send, steps_of


class Dead:
    """A task that died in its third step.

    Attributes:
        id: Its row.
        made: The steps whose functions ran.
    """

    def __init__(self, stand: OutboxStand) -> None:
        self.made: list[str] = []
        self.stand = stand
        broken = [True]

        def write(session: Session, name: str) -> str:
            self.made.append(name)
            session.add(Effect(name=name))
            session.flush()
            if name == "c" and broken and broken.pop():
                raise LookupError("no such document")
            return name

        @stand.task(name="ingest", once=True)
        def ingest() -> list[str]:
            return [step(name, write, name) for name in ("a", "b", "c")]

        stand.deliver(send(stand, ingest))
        [row] = dead_tasks.dead(stand.alchemy.engine)
        self.id: str = row["id"]
        self.made.clear()

    def run(self) -> list[str]:
        """Run it again, and return the steps whose functions ran."""
        self.stand.relay_all()
        assert self.stand.deliver(self.stand.sent()[0]).value == ["a", "b", "c"]
        return self.made

    def command(self, *arguments: str) -> str:
        """Run the command line on it."""
        meta = {"celery_alchemy": self.stand.alchemy}
        sub = command.commands[arguments[0]]
        context = sub.make_context(arguments[0], list(arguments[1:]))
        context.meta.update(meta)
        runner = CliRunner()
        with runner.isolation() as (out, *_), context:
            sub.invoke(context)
        return out.getvalue().decode()


@pytest.mark.parametrize(
    ("options", "ran"),
    [
        ((), ["c"]),
        (("--from", "b"), ["b", "c"]),
        (("--from", "a"), ["a", "b", "c"]),
        (("--fresh",), ["a", "b", "c"]),
    ],
    ids=["on", "from b", "from a", "fresh"],
)
def test_revived_task_runs_the_steps_that_were_forgotten(stand: OutboxStand, options: tuple[str, ...], ran: list[str]) -> None:
    """Without an option only those that were not recorded."""
    dead = Dead(stand)

    shown = dead.command("dead")
    dead.command("revive", dead.id, *options)

    assert "LookupError in step 'c': no such document" in shown
    assert "steps kept: 2, the last one 'b'" in shown
    assert dead.run() == ran


def test_step_that_is_not_recorded_cannot_be_gone_back_to(stand: OutboxStand) -> None:
    """The error names those that are, and nothing is revived."""
    dead = Dead(stand)

    with pytest.raises(ConfigurationError, match="recorded steps: 'a', 'b'"):
        dead_tasks.revive(stand.alchemy.engine, [dead.id], from_step="d")

    assert len(dead_tasks.dead(stand.alchemy.engine)) == 1
    assert steps_of(stand) == ["a", "b"]


def test_prune_deletes_steps_without_a_task(stand: OutboxStand) -> None:
    """Of a dead task that was given up by hand; those of one that may be revived stay."""
    dead = Dead(stand)
    dead_tasks.prune_all(stand.alchemy.engine, 1)
    before = steps_of(stand)
    stand.database.execute("DELETE FROM celery_outbox WHERE id = :id", id=dead.id)
    dead_tasks.prune_all(stand.alchemy.engine, 1)

    assert (before, steps_of(stand)) == (["a", "b"], [])
