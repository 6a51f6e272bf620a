"""Search: keywords in all scripts, exact vectors, their fusion, and citations that quote exactly."""

from __future__ import annotations

import math
import re
from io import StringIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import LETTERS, add, long_text, process
from ragline.databases import index_of
from ragline.databases.sqlite import match_expression
from ragline.presentation import print_passages
from ragline.ranking import VectorIndex, bm25, fuse
from ragline.searching import Mode, Passage, load_index, passages, rank
from ragline.tables import DocumentText


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=80))
def test_no_query_is_an_error(engine: Engine, query: str) -> None:
    """Quotes, operators, NUL characters, half of a surrogate pair: the database understands what is asked of it."""
    with engine.connect() as connection:
        assert index_of(connection).best(connection, query, limit=5) == []


@pytest.mark.parametrize(
    ("content", "query"),
    [
        ("Savepoints roll back a part of a transaction.", "how do SAVEPOINT and rolling behave?"),
        ("数据库事务必须提交或者回滚。", "事务的回滚"),
        ("トランザクションは確定されます。", "トランザクション"),
        ("데이터베이스는 트랜잭션을 커밋합니다.", "트랜잭션"),
        ("Ein Käfer läuft.", "kafer"),
        ("To be or not to be", "to be or not to be"),
    ],
)
def test_a_query_finds_its_passage_in_any_script(session: Session, content: str, query: str) -> None:
    """Word stems in English, pairs of characters where there are no spaces, accents or not, only stop words or not."""
    process(session, add(session, content).document_id)
    process(session, add(session, "Nothing of that kind.", "file:///b.txt").document_id)

    found = passages(session, rank(session, query, None, None, mode=Mode.KEYWORD))

    assert [passage.quote for passage in found] == [content]


@pytest.mark.parametrize(
    ("query", "quote", "marked"),
    [
        (
            "how do savepoints behave?",
            "A SAVEPOINT nests; savepointing is no word.",
            "SAVEPOINT savepointing",
        ),
        ("事务隔离级别", "数据库的事务隔离由它保证。", "事务隔离"),
        ("Käfer", "Viele Käfer laufen.", "Käfer"),
        ("the of", "Nothing of the query tells.", ""),
    ],
)
def test_the_words_of_a_query_are_marked_in_quotes(query: str, quote: str, marked: str) -> None:
    """In their other forms too, and inside of a run of characters where there are no spaces."""
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", width=200)
    passage = Passage(1, 1, "a.md", "file:///a.md", "", None, 0, len(quote), quote, 1.0)

    print_passages([passage], query, console)

    printed = console.file.getvalue()
    assert " ".join(re.findall(r"\x1b\[1;33m(.*?)\x1b\[0m", printed)) == marked


def test_stop_words_do_not_decide() -> None:
    """A question is asked by the words that tell, unless there are no others."""
    assert match_expression("What is the lock of a row?") == '"lock" OR "row"'
    assert match_expression("what is the") == '"what" OR "is" OR "the"'
    assert match_expression("?!") is None


VECTORS = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@given(VECTORS, st.integers(1, 40))
def test_exact_search_is_what_sorting_everything_gives(angles: list[int], limit: int) -> None:
    """Also among equal similarities, which are in the order of the ids."""
    matrix = np.array([[np.cos(angle), np.sin(angle)] for angle in angles], "f4")
    index = VectorIndex(np.arange(10, 10 + len(angles)), matrix)
    query = np.array([1, 0], "f4")

    nearest = index.nearest(query, limit=limit)

    everything = sorted(zip((-(matrix @ query)).tolist(), index.ids.tolist(), strict=True))
    assert [chunk_id for chunk_id, _ in nearest] == [chunk_id for _, chunk_id in everything[:limit]]


def test_fusion_rewards_what_both_rankings_have() -> None:
    """1 / (60 + rank) summed, ties in the order of the items."""
    fused = fuse([[1, 2, 3], [3, 4, 1]])

    assert [item for item, _ in fused] == [1, 3, 2, 4]
    assert dict(fused)[1] == pytest.approx(1 / 61 + 1 / 63)
    assert fuse([[7], [5]]) == [(5, 1 / 61), (7, 1 / 61)]


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    """One occurrence of a word that few texts have is worth more than several of one that many have."""
    texts = [
        (1, ["common"] * 3 + ["x"] * 7),
        (2, ["rare"] + ["x"] * 9),
        (3, ["rare"] + ["x"] * 4),
        (4, ["x"]),
    ]

    ranked = bm25(texts, {"common": 90, "rare": 2, "absent": 0}, rows=100, mean_words=10)

    assert [item for item, _ in ranked] == [3, 2, 1, 4]
    assert dict(ranked)[2] == pytest.approx(math.log(1 + 98.5 / 2.5))
    assert dict(ranked)[4] == 0


def test_passages_cite_exactly_and_the_same_every_time(session: Session, embedder: LetterEmbedder) -> None:
    """The quote is the document's text at the range that is cited."""
    for number, word in enumerate(("whale", "dolphin", "zebra")):
        added = add(session, long_text(word), f"file:///{number}.txt", LETTERS)
        process(session, added.document_id, embedder)
    index = load_index(session, embedder.name)
    vector = embedder.embed(["zebra"])[0]

    found = passages(session, rank(session, "zebra", vector, index))
    again = passages(session, rank(session, "zebra", vector, load_index(session, embedder.name)))

    assert found == again
    assert found[0].name == "2.txt"
    assert found[0].citation == f"2.txt, characters {found[0].start}-{found[0].end}"
    for passage in found:
        whole = session.scalars(
            select(DocumentText.text).where(DocumentText.document_id == passage.document_id)
        ).one()
        assert whole[passage.start : passage.end] == passage.quote


def test_vectors_of_another_model_and_of_unfinished_documents_are_not_searched(
    session: Session, embedder: LetterEmbedder
) -> None:
    """An index holds what its embedder made of documents that searches may see."""
    process(session, add(session, "some text", recipe=LETTERS).document_id, embedder)
    add(session, "more text", "file:///b.txt", LETTERS)

    assert len(load_index(session, "letters").ids) == 1
    assert len(load_index(session, "another").ids) == 0
    assert load_index(session, "another").nearest(np.ones(26, "f4"), limit=3) == []
