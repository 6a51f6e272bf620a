"""How long a hybrid search takes in an index of many chunks: alone, and while documents come in.

    python benchmarks/search.py --chunks 100000 --database postgresql://ragline@localhost/empty

The database must be empty and stays as it is; without one, a file of SQLite is made and deleted. The texts
are sentences of the Python language reference and of the READMEs of the installed packages, shuffled; the
vectors are random, so that what is measured is time alone. Queries are embedded by the real model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pydoc_data.topics
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CHUNKS_A_DOCUMENT = 8
SENTENCES_A_CHUNK = 6
DOCUMENTS_AT_ONCE = 100
PAUSE_SECONDS = 0.05
QUERIES = (
    "What happens when an exception is raised inside a with statement?",
    "Which object does a for loop call to get the next item?",
    "How are default parameter values evaluated?",
    "how do savepoints behave?",
    "install the package from source with pip on windows",
    "What does the walrus operator do?",
    "can a class define how its instances are compared",
    "timeout of a connection pool",
    "decorators with arguments",
    "the order in which operators bind",
)


def _sentences() -> list[str]:
    texts = list(pydoc_data.topics.topics.values())
    for distribution in importlib.metadata.distributions():
        readme = distribution.metadata.get_payload()
        texts.append(readme[:60_000] if isinstance(readme, str) else "")
    parts = (part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+", text))
    return [part for part in parts if 20 < len(part) < 400]


def write(documents: int, chunks_a_document: int, seed: int) -> None:
    """Write ready documents as the pipeline leaves them, in one transaction."""
    # ragline first: it sets how many threads numpy takes.
    from ragline.app import alchemy  # isort: skip
    from sqlalchemy import func, insert, select

    from ragline.databases import index_of
    from ragline.minilm.embedder import MiniLM
    from ragline.tables import Chunk, Document, Source, Vector
    from ragline.visibility import record

    with alchemy.begin() as session:
        first = (session.scalar(select(func.max(Document.id))) or 0) + 1
        first_chunk = (session.scalar(select(func.max(Chunk.id))) or 0) + 1
        ids = range(first, first + documents)
        session.execute(insert(Document), [_document(key) for key in ids])
        session.execute(insert(Source), [_source(key) for key in ids])
        chunks = _chunks(ids, chunks_a_document, first_chunk, random.Random(seed))
        session.execute(insert(Chunk), chunks)
        connection = session.connection()
        index_of(connection).add(connection, [(row["id"], row["content"]) for row in chunks])
        rows = list(zip((row["id"] for row in chunks), _vectors(len(chunks), seed), strict=True))
        vectors = [
            {"chunk_id": key, "embedder": MiniLM.name, "data": vector.tobytes()} for key, vector in rows
        ]
        session.execute(insert(Vector), vectors)
        index_of(connection).add_vectors(connection, rows)
        record(session, ids)


def _document(key: int) -> dict[str, Any]:
    from ragline.minilm.embedder import MiniLM
    from ragline.states import State
    from ragline.tables import utc_now

    recipe = {"parser": "", "splitter": "", "embedder": MiniLM.name, "is_permanent": False}
    named = {"id": key, "digest": f"{key:064}", "name": f"{key}.txt", "size_bytes": 0}
    return {**named, **recipe, "state": State.READY, "ready_at": utc_now()}


def _source(key: int) -> dict[str, Any]:
    place = {"uri": f"file:///{key}.txt", "uri_digest": f"{key:064}", "name": f"{key}.txt"}
    return {**place, "serving_id": key, "generation": 1}


def _chunks(ids: range, chunks_a_document: int, first: int, chosen: random.Random) -> list[dict[str, Any]]:
    from ragline.words import text_digest

    sentences = _sentences()
    chunks: list[dict[str, Any]] = []
    for key in ids:
        for position in range(chunks_a_document):
            content = " ".join(chosen.choices(sentences, k=SENTENCES_A_CHUNK))
            place = {"document_id": key, "position": position, "batch": 0, "tokens": 0, "heading": ""}
            ends = {"start": 0, "end": len(content), "first_page": None, "last_page": None}
            text = {"content": content, "digest": text_digest(content)}
            chunks.append({"id": first + len(chunks), **place, **ends, **text})
    return chunks


def _vectors(count: int, seed: int) -> npt.NDArray[np.float32]:
    import numpy as np

    from ragline.minilm.embedder import MiniLM

    vectors = np.random.default_rng(seed).standard_normal((count, MiniLM.dimensions), "f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def fill(chunks: int) -> None:
    """Write an index of so many chunks."""
    from ragline.app import alchemy, create_tables

    create_tables(alchemy)
    for seed in range(-(-chunks // (DOCUMENTS_AT_ONCE * CHUNKS_A_DOCUMENT))):
        write(DOCUMENTS_AT_ONCE, CHUNKS_A_DOCUMENT, seed)


def keep_writing() -> None:
    """Write documents of two chunks until the process is ended."""
    seed = 1_000_000
    while True:
        write(1, 2, seed)
        seed += 1
        time.sleep(PAUSE_SECONDS)


@contextmanager
def _writer() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, __file__, "--keep-writing"])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def measure(name: str, rounds: int) -> None:
    """Search, and print how long it took: on the clock, and of this process's own time."""
    from ragline.retrieval import find  # isort: skip
    import numpy as np

    seconds, used = [], []
    for at in range(rounds * len(QUERIES)):
        started, cpu = time.perf_counter(), time.process_time()
        found = find(QUERIES[at % len(QUERIES)], limit=10)
        assert found.passages, found.note
        seconds.append(time.perf_counter() - started)
        used.append(time.process_time() - cpu)
    row = (np.percentile(values, share) * 1000 for values in (seconds, used) for share in (50, 95))
    print(f"| {name} | {' | '.join(f'{value:.0f}' for value in row)} |", flush=True)


def main() -> None:
    """Fill an index and measure, or be the process that writes meanwhile."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--chunks", type=int, default=100_000)
    options.add_argument("--rounds", type=int, default=5, help="how often each query is asked")
    options.add_argument("--database", help="the URL of an empty database; SQLite by default")
    options.add_argument("--keep-writing", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.keep_writing:
        keep_writing()
    with tempfile.TemporaryDirectory(prefix="ragline-search-") as home:
        os.environ |= {"RAGLINE_HOME": home, "RAGLINE_EMBEDDER": "minilm"}
        os.environ.pop("RAGLINE_DATABASE_URL", None)
        if given.database:
            os.environ["RAGLINE_DATABASE_URL"] = given.database
        started = time.perf_counter()
        fill(given.chunks)
        print(f"{given.chunks} chunks written in {time.perf_counter() - started:.0f} s")
        print("\n| | p50 ms | p95 ms | p50 ms of CPU | p95 ms of CPU |\n|---|---|---|---|---|")
        measure("first searches, which read the vectors", 1)
        measure("searches alone", given.rounds)
        with _writer():
            time.sleep(3)
            measure("while documents come in", given.rounds)
        print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
