"""PostgreSQL and MariaDB beside SQLite: what each does in its own way, and the commands on all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from celery_alchemy import Alchemy
from sqlalchemy import Engine, create_engine, func, inspect, select, text
from sqlalchemy.orm import Session
from tests.services.brokers import Brokers
from tests.services.databases import Databases
from tests.services.wheels import start_postgresql

from conftest import LetterEmbedder, empty_tables
from pipelines import LETTERS, add, embedder_of, long_text, process, until_embedding
from ragline import pipeline
from ragline.audit import audit
from ragline.benchmark import scratch_engine
from ragline.databases import index_of
from ragline.question import question_of
from ragline.searching import DatabaseIndex, Mode, load_index, passages, rank
from ragline.settings import QUEUES
from ragline.tables import Base, Chunk, Vector
from ragline.words import telling_words, words
from ragline.workers import stop
from servers import eventually

SERVERS = ("postgresql", "mariadb")


@pytest.fixture
def databases() -> Iterator[Databases]:
    """Databases of this test's own, dropped at its end."""
    databases = Databases()
    yield databases
    databases.close()


def test_words_are_lower_case_without_accents_and_pairs_where_there_are_no_spaces() -> None:
    """The same words on every database, whatever its own parser would make of the text."""
    assert words("Käfer, naïve Straße! session.commit() snake_case e\u0301te\u0301") == [
        "kafer", "naive", "straße", "session", "commit", "snake", "case", "ete",
    ]  # fmt: skip
    assert words("PostgreSQLの全文検索 ё") == ["postgresql", "の全", "全文", "文検", "検索", "ё"]
    assert telling_words("What is the lock of a lock?") == ["lock"]


@pytest.mark.parametrize("query", ["C", "AI 3", "go", "word" * 40, "wörd" * 40])
def test_short_and_long_words_are_found(session: Session, query: str) -> None:
    """InnoDB ignores words of two characters and of more than 84, unless it is helped."""
    found = process(session, add(session, f"It is written in {query}.").document_id)
    process(session, add(session, "Nothing of that kind.", "file:///b.txt").document_id)

    ranked = passages(session, rank(session, query, None, None, mode=Mode.KEYWORD))

    assert [passage.document_id for passage in ranked] == [found.id]


def _create(url: str) -> None:
    """With an engine of its own, as each process has."""
    engine = create_engine(url)
    with engine.begin() as connection, index_of(connection).creation_lock(connection):
        Base.metadata.create_all(connection)
        index_of(connection).create(connection)
    engine.dispose()


@pytest.mark.parametrize("name", SERVERS)
def test_processes_that_start_at_once_make_the_tables_once(
    databases: Databases, tmp_path: Path, name: str
) -> None:
    """The first `ragline worker` on several machines at a time: none of them fails, and everything is there."""
    url = databases.open(name, tmp_path).url
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_create, [url] * 4))

    engine = create_engine(url)
    assert {*Base.metadata.tables, "chunk_keywords"} <= set(inspect(engine).get_table_names())
    engine.dispose()


@pytest.fixture(scope="session")
def pgvector() -> Iterator[Engine]:
    """A PostgreSQL with pgvector: the usual server's, or the one in a wheel."""
    with _with_pgvector() as url, scratch_engine(url) as engine:
        Alchemy(bind=engine).create_tables()
        yield engine


@contextmanager
def _with_pgvector() -> Iterator[str]:
    try:
        yield start_postgresql().replace("postgresql://", "postgresql+psycopg://", 1)
    except ImportError as error:
        pytest.skip(f"there is no PostgreSQL with pgvector in a wheel here: {error}")


def test_pgvector_finds_what_exact_search_in_memory_finds(
    pgvector: Engine, embedder: LetterEmbedder, engine_of: Callable[[str], Engine]
) -> None:
    """The same passages in the same order, only of documents that searches may see; deleted ones are gone."""
    found = []
    for engine in (pgvector, engine_of("sqlite")):
        empty_tables(engine)
        with Session(engine, expire_on_commit=False) as session:
            for number, word in enumerate(("whale", "dolphin", "zebra")):
                process(
                    session,
                    add(session, long_text(word), f"file:///{number}.txt", LETTERS).document_id,
                    embedder,
                )
            process(
                session, add(session, long_text("quagga"), "file:///2.txt", LETTERS).document_id, embedder
            )
            unfinished = add(session, long_text("unfinished"), "file:///3.txt", LETTERS).document_id
            pipeline.embed(
                session, unfinished, until_embedding(session, unfinished)[0], embedder_of(embedder)
            )
            index = load_index(session, embedder.name)
            ranked = rank(session, "", embedder.embed(["a quagga"])[0], index, mode=Mode.VECTOR)
            found.append([(passage.quote, round(passage.score, 5)) for passage in passages(session, ranked)])
            assert isinstance(index, DatabaseIndex) is (engine is pgvector)
            assert audit(session) == [
                "3.txt is still embedding.",
                "file:///3.txt has no document that is settled.",
            ]

    assert found[0] == found[1]
    assert "quagga" in found[0][0][0]
    with Session(pgvector) as session:
        session.execute(text("DELETE FROM embedding_index WHERE chunk_id = (SELECT min(id) FROM chunk)"))
        assert any("in the vector index" in problem for problem in audit(session))


def test_pgvector_finds_exact_words_and_leaves_words_out(pgvector: Engine, embedder: LetterEmbedder) -> None:
    """In SQL, before the nearest are taken."""
    empty_tables(pgvector)
    contents = [f"The blue whale number {number}." for number in range(9)] + ["A whale is blue.", "A cat."]
    with Session(pgvector, expire_on_commit=False) as session:
        for number, content in enumerate(contents):
            added = add(session, content, f"file:///{number}.txt", LETTERS)
            process(session, added.document_id, embedder)
        connection = session.connection()

        def nearest(asked: str) -> list[str]:
            vector = embedder.embed(["blue whale"])[0]
            found = index_of(connection).nearest(
                connection, embedder.name, vector, question_of(asked), limit=2
            )
            chunks = [session.get_one(Chunk, chunk_id) for chunk_id, _ in found]
            return sorted(chunk.content for chunk in chunks)

        assert nearest('"is blue"') == ["A whale is blue."]
        assert nearest("what -blue") == ["A cat."]
        assert nearest('what -"blue whale"') == ["A cat.", "A whale is blue."]
        assert nearest('"A" -cats') == ["A whale is blue."]


def test_pgvector_that_comes_later_gets_the_vectors_that_are_there(
    pgvector: Engine, embedder: LetterEmbedder
) -> None:
    """The extension was installed after documents were added: nothing has to be added again."""
    empty_tables(pgvector)
    with pgvector.begin() as connection:
        connection.execute(text("DROP TABLE embedding_index"))
    with Session(pgvector, expire_on_commit=False) as session:
        process(session, add(session, long_text("whale"), recipe=LETTERS).document_id, embedder)
        before = rank(session, "", np.ones(26, "f4"), load_index(session, embedder.name), mode=Mode.VECTOR)

    with pgvector.begin() as connection:
        index_of(connection).create(connection)

    with Session(pgvector) as session:
        index = load_index(session, embedder.name)
        after = rank(session, "", np.ones(26, "f4"), index, mode=Mode.VECTOR)
        assert len(after.chunks) == session.scalar(select(func.count(Vector.chunk_id)))
    assert isinstance(index, DatabaseIndex)
    assert [chunk_id for chunk_id, _ in after.chunks] == [chunk_id for chunk_id, _ in before.chunks]


@contextmanager
def _servers(database: str, broker: str, folder: Path, databases: Databases) -> Iterator[dict[str, str]]:
    opened = Brokers().open(broker, folder)
    for kind in QUEUES:
        opened.queue(kind)  # deleted with the others
    try:
        yield {
            "RAGLINE_HOME": str(folder / "home"),
            "RAGLINE_DATABASE_URL": databases.open(database, folder).url,
            "RAGLINE_BROKER_URL": opened.settings["broker_url"],
            "RAGLINE_QUEUES": opened.prefix,
            "COLUMNS": "200",
        }
    finally:
        opened.close()


def ragline(servers: dict[str, str], *arguments: str) -> str:
    """Run a command as a person does and return what it prints."""
    command = [sys.executable, "-c", "from ragline.cli import main; main()", *arguments]
    result = subprocess.run(
        command, env={**os.environ, **servers}, capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@contextmanager
def workers(servers: dict[str, str], folder: Path) -> Iterator[None]:
    """A worker for parsing and another for embedding."""
    with ExitStack() as stack:
        for kind in QUEUES:
            log = stack.enter_context((folder / f"{kind}.log").open("wb"))
            command = "from ragline.cli import main; main()"
            process = subprocess.Popen(
                [sys.executable, "-c", command, "worker", "--queue", kind, "--processes", "1"],
                env={**os.environ, **servers},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(stop, process)
        eventually(lambda: len(json.loads(ragline(servers, "status", "--json"))["workers"]) == 2, seconds=90)
        yield


@pytest.mark.parametrize(("database", "broker"), [("postgresql", "redis"), ("mariadb", "rabbitmq")])
def test_the_commands_work_on_servers_by_configuration_alone(
    databases: Databases, tmp_path: Path, database: str, broker: str
) -> None:
    """Two workers, one for each queue, on a database and a broker of which only the URLs are told."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, animal in enumerate(("whale", "bee", "quagga")):
        (folder / f"{number}.md").write_text(long_text(animal))
    (folder / "cjk.txt").write_text("数据库事务必须提交或者回滚。", encoding="utf-8")

    with _servers(database, broker, tmp_path, databases) as servers, workers(servers, tmp_path):
        ingested = ragline(servers, "ingest", str(folder))
        chinese = json.loads(ragline(servers, "search", "事务的回滚", "--json"))
        status = json.loads(ragline(servers, "status", "--json"))

    assert "4 files: 4 added." in ingested
    assert [passage["name"] for passage in chinese] == ["cjk.txt"]
    assert (status["documents"]["ready"], len(status["workers"])) == (4, 2)


@pytest.mark.parametrize("name", SERVERS)
def test_a_scratch_place_is_gone_after_its_block(databases: Databases, tmp_path: Path, name: str) -> None:
    """A schema, or a database, beside the real tables, which are not touched."""
    opened = databases.open(name, tmp_path)
    opened.execute("CREATE TABLE chunk (id integer)")
    with scratch_engine(opened.url) as scratch:
        place = inspect(scratch).default_schema_name

    assert place not in inspect(opened.engine).get_schema_names()
    assert inspect(opened.engine).get_table_names() == ["chunk"]


def test_quality_is_measured_on_the_database_that_is_configured(databases: Databases, tmp_path: Path) -> None:
    """In a scratch place: nothing of the collection stays."""
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": "Whales", "text": "They are large."}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a large whale"}\n')
    (tmp_path / "qrels.txt").write_text("q 0 d 1\n")
    opened = databases.open("postgresql", tmp_path)
    servers = {"RAGLINE_HOME": str(tmp_path / "home"), "RAGLINE_DATABASE_URL": opened.url}

    measured = json.loads(ragline(servers, "eval", str(tmp_path), "--json"))

    assert measured["keyword"]["ndcg_at_10"] == 1
    assert inspect(opened.engine).get_table_names() == []
