"""Fixtures: a home of the tests' own, databases in memory, a small embedder, real documents."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# ragline.app reads the settings when it is imported: before that, nothing of the person's own may be in them.
HOME = Path(tempfile.mkdtemp(prefix="ragline-tests-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
KEPT = ("RAGLINE_CACHE", "RAGLINE_TEST_")
for name in [name for name in os.environ if name.startswith("RAGLINE_") and not name.startswith(KEPT)]:
    os.environ.pop(name)
os.environ["RAGLINE_HOME"] = str(HOME)
os.environ["RAGLINE_EMBEDDER"] = "none"
os.environ["RAGLINE_REDELIVER_SECONDS"] = "5"
os.environ["RAGLINE_WORKER_LOST_SECONDS"] = "5"

# Servers are found and started as for the tests of the library.
sys.path.insert(0, str(Path(__file__).parents[3]))

from celery_alchemy import Alchemy  # noqa: E402
from sqlalchemy import Engine, inspect, text, update  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402
from tests.services.databases import Databases  # noqa: E402

from letters import LetterEmbedder  # noqa: E402
from ragline.benchmark import scratch_engine  # noqa: E402
from ragline.databases import index_of  # noqa: E402
from ragline.errors import ModelUnavailableError  # noqa: E402
from ragline.minilm.files import fetch  # noqa: E402
from ragline.settings import settings_from  # noqa: E402
from ragline.tables import Base, Source  # noqa: E402

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def embedder() -> LetterEmbedder:
    """An embedder that needs no model."""
    return LetterEmbedder()


@pytest.fixture(scope="session")
def engine_of() -> Iterator[Callable[[str], Engine]]:
    """Gives an engine with ragline's tables on a database, made when first asked for and gone at the end."""
    with ExitStack() as stack:
        databases = Databases()
        stack.callback(databases.close)

        @functools.cache
        def engine_of(name: str) -> Engine:
            if name == "sqlite-file":
                return _file_engine()
            url = "sqlite://" if name == "sqlite" else databases.open(name, HOME).url
            engine = stack.enter_context(scratch_engine(url))
            Alchemy(bind=engine).create_tables()
            return engine

        yield engine_of


def _file_engine() -> Engine:
    engine = Alchemy(bind=f"sqlite:///{HOME / 'shared.db'}").engine
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        index_of(connection).create(connection)
    Alchemy(bind=engine).create_tables()
    return engine


@pytest.fixture(params=("sqlite", "postgresql", "mariadb"))
def engine(request: pytest.FixtureRequest, engine_of: Callable[[str], Engine]) -> Engine:
    """An empty database with ragline's tables: each kind in turn."""
    engine = engine_of(request.param)
    empty_tables(engine)
    return engine


def empty_tables(engine: Engine) -> None:
    """Delete all rows."""
    with engine.begin() as connection:
        connection.execute(update(Source).values(serving_id=None, pending_id=None))
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
        # Where foreign keys do not reach.
        there = set(inspect(connection).get_table_names())
        for name in sorted(there & {"chunk_keywords", "keyword_count"}):
            connection.execute(text(f"DELETE FROM {name}"))


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session on the empty database."""
    with Session(engine, expire_on_commit=False) as session:
        yield session


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The files of the real model; tests that need it are skipped where it cannot be fetched."""
    try:
        return fetch(settings_from().cache)
    except ModelUnavailableError as error:
        pytest.skip(f"the embedding model cannot be had: {error}")


def _real_data(variable: str, name: str, file: str) -> Path:
    folder = Path(os.environ.get(variable) or SHARED / name)
    if not (folder / file).exists():
        pytest.skip(f"{variable} names no folder with {file}")
    return folder


@pytest.fixture(scope="session")
def documents() -> Path:
    """A folder of real documents that is no part of the project."""
    return _real_data("RAGLINE_TEST_DOCUMENTS", "documents", "SOURCES.md")


@pytest.fixture(scope="session")
def cranfield() -> Path:
    """The Cranfield collection, which is no part of the project."""
    return _real_data("RAGLINE_TEST_CRANFIELD", "cranfield", "cran.qry")
