"""Several people and workers at once, on every database: what is left adds up, whoever came first."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from celery_alchemy import is_transient
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from conftest import LetterEmbedder, empty_tables
from pipelines import (
    KEYWORDS,
    LETTERS,
    add,
    counter_of,
    embedder_of,
    long_text,
    offer,
    process,
    until_embedding,
)
from ragline import intake, pipeline, transactions
from ragline.app import alchemy
from ragline.audit import audit
from ragline.intake import Intake, delete_document, forget_results, take_in
from ragline.searching import Mode, passages, rank
from ragline.states import State
from ragline.tables import Document, Original, Source
from ragline.transitions import move

THREADS = 4
SECONDS = float(os.environ.get("RAGLINE_TEST_SECONDS", "2"))


@pytest.fixture(params=("sqlite", "postgresql", "mariadb"))
def engine(request: pytest.FixtureRequest, engine_of: Callable[[str], Engine]) -> Engine:
    """An empty database that several threads can use: SQLite's is a file, set up as `Alchemy` does."""
    engine = engine_of("sqlite-file" if request.param == "sqlite" else request.param)
    empty_tables(engine)
    return engine


def transact(engine: Engine, use_case: Callable[[Session], object]) -> object:
    """Run a use case as a task or command does: again when the database had to end its transaction."""
    for _ in range(20):
        try:
            with Session(engine, expire_on_commit=False) as session:
                result = use_case(session)
                session.commit()
                return result
        except DBAPIError as error:
            if not is_transient(error):
                raise
    raise AssertionError("it never got through")


def at_once(engine: Engine, *use_cases: Callable[[Session], object]) -> list[object]:
    """Run use cases in threads that begin together."""
    barrier = threading.Barrier(len(use_cases))

    def run(use_case: Callable[[Session], object]) -> object:
        barrier.wait()
        return transact(engine, use_case)

    with ThreadPoolExecutor(len(use_cases)) as pool:
        return list(pool.map(run, use_cases))


def test_one_file_that_is_uploaded_several_times_at_once_is_one_document(engine: Engine) -> None:
    """From one place and from several: one document, one copy of the bytes, one source for each place."""
    for round_number in range(5):
        offers = [offer(f"text {round_number}", f"file:///{at // 2}.txt") for at in range(THREADS)]

        outcomes = at_once(engine, *(partial(take_in, offer=one, recipe=KEYWORDS) for one in offers))

        assert len({outcome.document_id for outcome in outcomes}) == 1
    with Session(engine) as session:
        process(session, outcomes[0].document_id)
        counts = [
            session.scalar(select(func.count()).select_from(table)) for table in (Document, Original, Source)
        ]
        assert counts == [1, 1, 2]
        assert audit(session) == []


def test_a_new_generation_that_comes_while_the_old_one_is_finished_is_not_lost(
    engine: Engine, embedder: LetterEmbedder
) -> None:
    """Whichever is first: the new one is what the source waits for, or shows."""
    for round_number in range(8):
        uri = f"file:///{round_number}.txt"
        with Session(engine) as session:
            first = add(session, f"old {round_number}", uri, LETTERS).document_id
            (batch,) = until_embedding(session, first)

        _, second = at_once(
            engine,
            partial(pipeline.embed, document_id=first, batch=batch, embedder_of=embedder_of(embedder)),
            partial(take_in, offer=offer(f"new {round_number}", uri), recipe=LETTERS),
        )

        with Session(engine) as session:
            process(session, second.document_id, embedder)
            assert audit(session) == []
            assert (
                session.scalars(select(Source.serving_id).order_by(Source.id.desc()).limit(1)).one()
                == second.document_id
            )


def test_the_last_two_batches_that_end_at_once_make_the_document_ready(
    engine: Engine, embedder: LetterEmbedder
) -> None:
    """Neither sees the other's vectors until it is committed, and still one of them finishes the document."""
    for round_number in range(5):
        with Session(engine) as session:
            uri = f"file:///{round_number}.txt"
            document_id = add(session, long_text(f"w{round_number}"), uri, LETTERS).document_id
            batches = until_embedding(session, document_id)

        finished = at_once(
            engine,
            *(
                partial(
                    pipeline.embed, document_id=document_id, batch=batch, embedder_of=embedder_of(embedder)
                )
                for batch in batches
            ),
        )

        assert sorted(finished) == [False] * (len(batches) - 1) + [True]


def test_the_model_changes_while_a_document_is_indexed(session: Session, embedder: LetterEmbedder) -> None:
    """Every document is of one model: late batches of the old one find nothing, searches see old or new, whole."""
    first = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, first)
    pipeline.embed(session, first, batches[0], embedder_of(embedder))
    session.commit()

    second = add(session, long_text("whale"), recipe=KEYWORDS)
    assert not pipeline.embed(session, first, batches[1], embedder_of(embedder))
    session.commit()
    document = process(session, second.document_id)

    assert second.intake is Intake.REPLACED
    assert session.get(Document, first) is None
    assert document.embedder == KEYWORDS.embedder
    assert passages(session, rank(session, "whale", None, None, mode=Mode.KEYWORD))
    assert audit(session) == []


class DeletedMeanwhile(Session):
    """A session of a step whose document somebody else deletes as soon as it was read."""

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        """Read a row; a document is gone after that."""
        found = super().get(entity, ident, **options)
        if entity is Document:
            with Session(self.get_bind()) as other:
                delete_document(other, ident)
                other.commit()
        return found


@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_step_whose_document_is_deleted_while_it_begins_does_nothing(
    engine_of: Callable[[str], Engine], steps_before: int
) -> None:
    """It is no failure of the document: nothing is left to process, and nothing to tell anybody of."""
    engine = engine_of("postgresql")
    empty_tables(engine)
    steps: list[Callable[[Session, int], object]] = [
        pipeline.parse,
        partial(pipeline.split, counter_of=counter_of, batch_chunks=3),
    ]
    with Session(engine) as session:
        document_id = add(session, "text", recipe=KEYWORDS).document_id
        for step in steps[:steps_before]:
            step(session, document_id)
            session.commit()

    with DeletedMeanwhile(engine) as session:
        assert not steps[steps_before](session, document_id)
        session.commit()

    with Session(engine) as session:
        assert session.scalars(select(Document)).all() == []
        assert audit(session) == []


class Crowd:
    """People and workers who do at random what people and workers do, all at once."""

    def __init__(self, engine: Engine, embedder: LetterEmbedder, seed: int) -> None:
        self.engine, self.embedder = engine, embedder
        self.deadline = time.monotonic() + SECONDS
        self.seed = seed

    def run(self) -> None:
        """Let them, for `SECONDS`."""
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [
                pool.submit(self._act, random.Random(f"{self.seed}/{at}")) for at in range(THREADS)
            ]:
                future.result()

    def _act(self, chance: random.Random) -> None:
        while time.monotonic() < self.deadline:
            act = chance.choice((self._upload, self._control, self._work, self._work, self._work))
            transact(self.engine, lambda session, act=act: act(session, chance))

    def _upload(self, session: Session, chance: random.Random) -> None:
        text = long_text(chance.choice(("whale", "bee", "quagga")), sentences=40)
        take_in(
            session, offer(text, f"file:///{chance.randrange(4)}.txt"), chance.choice((KEYWORDS, LETTERS))
        )

    def _control(self, session: Session, chance: random.Random) -> None:
        document_id = self._any(session, chance)
        match chance.randrange(6):
            case 0:
                move(session, document_id, State.PAUSED)
            case 1:
                if move(session, document_id, State.CANCELLED):
                    forget_results(session, document_id)
            case 2:
                pipeline.fail(session, TimeoutError("too slow"), document_id)
            case 3:
                delete_document(session, document_id)
            case _:
                move(session, document_id, State.QUEUED, reason=None)

    def _work(self, session: Session, chance: random.Random) -> None:
        work(session, self._any(session, chance), self.embedder)

    def _any(self, session: Session, chance: random.Random) -> int:
        ids = session.scalars(select(Document.id)).all()
        session.commit()
        return chance.choice(ids) if ids else 0


def work(session: Session, document_id: int, embedder: LetterEmbedder) -> None:
    """Do the step that a document waits for."""
    pipeline.admit(session, document_id)
    session.commit()
    pipeline.parse(session, document_id)
    session.commit()
    pipeline.split(session, document_id, counter_of, batch_chunks=3)
    session.commit()
    for batch in range(9):
        pipeline.embed(session, document_id, batch, embedder_of(embedder))
        session.commit()


def test_whatever_people_and_workers_do_at_once_adds_up(engine: Engine, embedder: LetterEmbedder) -> None:
    """Uploads, controls, deletions, failures and steps from four threads; then everything is taken to its end."""
    seed = random.randrange(1 << 32)
    Crowd(engine, embedder, seed).run()

    with Session(engine) as session:
        for document_id in session.scalars(select(Document.id)).all():
            move(session, document_id, State.QUEUED, reason=None)
            session.commit()
            work(session, document_id, embedder)
        assert audit(session) == [], seed
        assert set(session.scalars(select(Document.state))) <= {State.READY}, seed


def test_a_transaction_that_the_database_ends_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadlock with somebody else is nothing that the person at the keyboard has to know of."""
    runs = []
    monkeypatch.setattr(transactions, "PAUSE_SECONDS", 0.001)
    impatient = create_engine(alchemy.engine.url, poolclass=NullPool, connect_args={"timeout": 0})

    def use_case(session: Session) -> str:
        runs.append(session)
        session.execute(select(1))
        if len(runs) < 3:
            with impatient.connect() as other:
                other.execute(text("BEGIN IMMEDIATE"))  # refused: the use case's own session may write
        return "done"

    assert transactions.in_transaction(use_case) == "done"
    assert len(runs) == len(set(map(id, runs))) == 3


@pytest.mark.parametrize("table", [Source, Document])
def test_a_row_that_another_has_inserted_and_deleted_is_inserted_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, table: type[Any]
) -> None:
    """The INSERT finds the other's row, and the look for it none any more."""
    insert = intake._insert_missing
    found: list[object] = []

    def insert_later(session: Session, into: type[Any], **values: object) -> None:
        if into is table and not found:
            found.append(into)
            return
        insert(session, into, **values)

    monkeypatch.setattr(intake, "_insert_missing", insert_later)
    transact(engine, lambda session: take_in(session, offer("whale", "file:///a.txt"), KEYWORDS))

    assert found == [table]
    with Session(engine) as session:
        assert session.scalar(select(func.count(table.id))) == 1
