"""The soak's accounts: what was promised, what was done, and how the two differ.

A promise is written in the same transaction, or SAVEPOINT, as the enqueue of the task that is to keep it, so that it is committed if
and only if the task is. The effect is written by the task.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy.databases.tables import outbox
from tests.services.databases import Database


class Base(DeclarativeBase):
    """The soak's own tables."""


class Promise(Base):
    """A name whose effect is to be there exactly once."""

    __tablename__ = "soak_promise"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)


class Effect(Base):
    """What a task did; nothing stops it from being written twice."""

    __tablename__ = "soak_effect"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(100), index=True)
    task_id: Mapped[str] = mapped_column(String(100))


def promise(session: Session, name: str) -> str:
    """Write a promise now and return its name."""
    session.add(Promise(name=name))
    session.flush()
    return name


@dataclass(frozen=True)
class Accounts:
    """How promises and effects compare.

    Attributes:
        promised: Promises that were committed.
        lost: Their names without an effect.
        doubled: Names with more than one effect.
        ghosts: Names with an effect that nobody promised: sent from what was rolled back.
        open: Outbox rows that are neither completed nor dead.
        dead: Outbox rows that were set aside.
    """

    promised: int
    lost: list[str]
    doubled: list[str]
    ghosts: list[str]
    open: int
    dead: int

    @property
    def settled(self) -> bool:
        """Nothing is under way any more."""
        return not self.lost and self.open == 0

    @property
    def add_up(self) -> bool:
        """Every effect exactly once, and no other."""
        return not (self.lost or self.doubled or self.ghosts or self.open or self.dead)


def accounts(database: Database) -> Accounts:
    """Read the accounts from outside."""
    unkept = select(Promise.name).outerjoin(Effect, Effect.name == Promise.name).where(Effect.id.is_(None))
    doubled = select(Effect.name).group_by(Effect.name).having(func.count() > 1)
    unpromised = select(Effect.name).outerjoin(Promise, Effect.name == Promise.name).where(Promise.name.is_(None))
    is_open = outbox.c.completed_at.is_(None) & outbox.c.died_at.is_(None)
    with Session(database.engine) as session:
        return Accounts(
            promised=session.scalar(select(func.count()).select_from(Promise)) or 0,
            lost=list(session.scalars(unkept)),
            doubled=list(session.scalars(doubled)),
            ghosts=list(session.scalars(unpromised.distinct())),
            open=session.scalar(select(func.count()).select_from(outbox).where(is_open)) or 0,
            dead=session.scalar(select(func.count()).select_from(outbox).where(outbox.c.died_at.is_not(None))) or 0,
        )
