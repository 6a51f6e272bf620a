"""Search quality on a collection with judgements: reading it, indexing it in memory, and the measures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragline.errors import ConfigurationError

DEPTH = 10
RECALL_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Collection:
    """A test collection.

    Attributes:
        documents: text by document name.
        queries: text by query name.
        judgements: for each query, the gain of each relevant document: a positive number, larger is better.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over the queries that have judgements, each from 0 to 1."""

    ndcg_at_10: float
    average_precision: float
    recall_at_100: float


def read_collection(folder: Path) -> Collection:
    """Read a collection in the Cranfield format, or in the TREC format as BEIR packs it.

    Cranfield: `cran.all.1400`, `cran.qry`, `cranqrel`. TREC: `corpus.jsonl`, `queries.jsonl` and judgements
        of four columns, or BEIR's three with a heading, in `qrels`, `qrels.txt` or `qrels/test.tsv`.

    Raises:
        ConfigurationError: the folder holds neither.
    """
    if (folder / "cran.qry").is_file():
        return _read_cranfield(folder)
    if (folder / "corpus.jsonl").is_file():
        return _read_trec(folder)
    raise ConfigurationError(f"{folder} holds neither cran.qry (Cranfield) nor corpus.jsonl (TREC).")


def measure_ranking(rankings: Mapping[str, Sequence[str]], collection: Collection) -> Measures:
    """Measure rankings, given as document names by query name, best first."""
    judged = [query for query in collection.queries if collection.judgements.get(query)]
    if not judged:
        raise ConfigurationError("No query of the collection has a judgement.")
    rows = [_measure_query(rankings.get(query, ()), collection.judgements[query]) for query in judged]
    ndcg, precision, recall = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return Measures(ndcg, precision, recall)


def _measure_query(ranking: Sequence[str], gains: Mapping[str, int]) -> tuple[float, float, float]:
    gained = sum(
        gains.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(ranking[:DEPTH], start=1)
    )
    ideal = sorted(gains.values(), reverse=True)[:DEPTH]
    best = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ideal, start=1))
    hits, precision = 0, 0.0
    for rank, name in enumerate(ranking, start=1):
        if name in gains:
            hits += 1
            precision += hits / rank
    found = sum(name in gains for name in ranking[:RECALL_DEPTH])
    return gained / best, precision / len(gains), found / len(gains)


_FIELD = re.compile(r"^\.([TABW])[ \t]*\n", re.MULTILINE)


def _records(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for record in re.split(r"^\.I ", text, flags=re.MULTILINE)[1:]:
        number, _, body = record.partition("\n")
        parts = _FIELD.split(body)
        yield (
            number.strip(),
            {name: value.strip() for name, value in zip(parts[1::2], parts[2::2], strict=True)},
        )


def _read_cranfield(folder: Path) -> Collection:
    documents = {
        str(int(number)): f"{fields.get('T', '')}\n\n{fields.get('W', '')}".strip()
        for number, fields in _records((folder / "cran.all.1400").read_text(encoding="latin-1"))
    }
    # The judgements number the queries by position, from 1, and not by the number after `.I`.
    records = enumerate(_records((folder / "cran.qry").read_text(encoding="latin-1")), start=1)
    queries = {str(position): " ".join(fields["W"].split()) for position, (_, fields) in records}
    judgements: dict[str, dict[str, int]] = {}
    for line in (folder / "cranqrel").read_text(encoding="latin-1").splitlines():
        query, document, code = line.split()
        # 1 is best and 4 least; -1 and 5 are not relevant (Source: cranqrel.readme and the collection's own
        # files).
        if 1 <= int(code) <= 4:
            judgements.setdefault(query, {})[document] = 5 - int(code)
    return Collection(documents, queries, judgements)


def _read_trec(folder: Path) -> Collection:
    documents = {
        str(row["_id"]): f"{row.get('title') or ''}\n\n{row.get('text') or ''}".strip()
        for row in _json_lines(folder / "corpus.jsonl")
    }
    queries = {str(row["_id"]): row["text"] for row in _json_lines(folder / "queries.jsonl")}
    judgements: dict[str, dict[str, int]] = {}
    for line in _judgement_file(folder).read_text(encoding="utf-8").splitlines():
        columns = line.split()
        # TREC: query, iteration, document, gain. BEIR: query, document, gain, below a heading.
        if len(columns) < 3 or not re.fullmatch(r"-?\d+", columns[-1]):
            continue
        if int(columns[-1]) > 0:
            judgements.setdefault(columns[0], {})[columns[-2]] = int(columns[-1])
    judged = {query: text for query, text in queries.items() if query in judgements}
    return Collection(documents, judged, judgements)


def _judgement_file(folder: Path) -> Path:
    for name in ("qrels/test.tsv", "qrels.txt", "qrels.tsv", "qrels"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigurationError(f"{folder} has no judgements: qrels/test.tsv, qrels.txt, qrels.tsv or qrels.")


def _json_lines(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)
