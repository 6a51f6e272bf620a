"""Search: keywords in all scripts, exact vectors, their fusion, and citations that quote exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import StringIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from conftest import LetterEmbedder, empty_tables
from pipelines import LETTERS, add, empty_index, long_text, process
from ragline import controls, retrieval, searching, vectors
from ragline.app import alchemy
from ragline.audit import audit
from ragline.databases import index_of, postgresql
from ragline.excerpts import excerpt
from ragline.naming import find_document
from ragline.presentation import print_passages
from ragline.question import Question
from ragline.ranking import bm25, deciding_words, fuse
from ragline.retrieval import find
from ragline.searching import Mode, Passage, Ranking, bring_up_to_date, load_index, passages, rank
from ragline.tables import Chunk, DocumentText
from ragline.vectors import GrowingIndex, Ids, Matrix, VectorIndex
from ragline.visibility import state
from ragline.words import marked_spans, telling_words


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=80))
def test_no_query_is_an_error(engine: Engine, query: str) -> None:
    """Quotes, operators, NUL characters, half of a surrogate pair: the database understands what is asked of it."""
    with engine.connect() as connection:
        assert index_of(connection).best(connection, Question(query), limit=5) == []


@pytest.mark.parametrize(
    ("content", "query"),
    [
        ("Savepoints roll back a part of a transaction.", "how do SAVEPOINT and rolling behave?"),
        ("数据库事务必须提交或者回滚。", "事务的回滚"),
        ("トランザクションは確定されます。", "トランザクション"),
        ("데이터베이스는 트랜잭션을 커밋합니다.", "트랜잭션"),
        ("Ein Käfer läuft.", "kafer"),
        ("Die Straße ist lang.", "strasse"),
        ("Die Strasse ist lang.", "Straße"),
        ("EINE WASSERSTRASSE", "wasserstraße"),
        ("Die Schloßstraße, die Schlossallee", "schlossstrasse"),
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


LINES = "\n".join(f"Line {number}\tis  about nothing." for number in range(30))
LONG = LINES.replace("Line 20\tis  about nothing", "Line 20 is about whales")
PROSE = "Much is said before that. " * 40 + "Then come the whales. " + "And more is said after them. " * 40


@pytest.mark.parametrize("quote", [LONG, PROSE])
def test_a_terminal_shows_some_lines_around_the_first_hit(quote: str) -> None:
    """With an ellipsis where it is cut; all of it when that is asked for."""
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=80)
    passage = Passage(1, 1, "a.md", "file:///a.md", "", None, 0, len(quote), quote, 1.0)

    print_passages([passage], "whales", console)
    _, *shown = console.file.getvalue().splitlines()
    print_passages([passage], "whales", console, is_full=True)
    full = console.file.getvalue().splitlines()[len(shown) + 1 :]

    assert "whales" in "".join(shown)
    assert len(shown) <= 7
    assert (shown[0][3], shown[-2].rstrip()[-1]) == ("…", "…")
    assert " ".join(full).split()[-len(quote.split()) :] == quote.split()


def test_a_program_reads_quotes_exactly() -> None:
    """Neither wrapped nor padded, with each tab."""
    console = Console(file=StringIO(), width=20)
    passage = Passage(1, 1, "a.md", "file:///a.md", "", None, 0, len(LONG), LONG, 1.0)

    print_passages([passage], "whales", console)

    assert console.file.getvalue() == f"1. a.md, characters 0-{len(LONG)}\n{LONG}\n\n"


@given(st.text(alphabet="a \n", max_size=1500), st.integers(0, 1499))
def test_an_excerpt_is_of_the_text_and_has_the_place(text: str, at: int) -> None:
    """Whatever lines there are, and where there is no space to cut at."""
    at = min(at, max(len(text) - 1, 0))
    text = f"{text[:at]}X{text[at:]}"

    cut = excerpt(text, at)

    inner = cut.removeprefix("… ").removesuffix(" …")
    assert "X" in inner
    assert inner in text
    assert len(inner) <= 400
    assert inner.count("\n") <= 5


def test_stop_words_do_not_decide() -> None:
    """A question is asked by the words that tell, unless there are no others."""
    assert telling_words("What is the lock of a row?") == ["lock", "row"]
    assert telling_words("what is the") == ["what", "is", "the"]
    assert telling_words("?!") == []


VECTORS = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@given(VECTORS, st.integers(1, 40))
def test_exact_search_is_what_sorting_everything_gives(angles: list[int], limit: int) -> None:
    """Also among equal similarities, which are in the order of the ids."""
    matrix = np.array([[np.cos(angle), np.sin(angle)] for angle in angles], "f4")
    index = VectorIndex(np.arange(10, 10 + len(angles)), [matrix])
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
        (1, [*["common"] * 3, *"abcdefghi"]),
        (2, ["rare", *"abcdefghi"]),
        (3, ["rare", *"abcdabcd"]),
        (4, ["a"]),
    ]

    ranked = bm25(texts, {"common": 90, "rare": 2, "absent": 0}, rows=100, mean_words=10)

    assert [item for item, _ in ranked] == [3, 2, 1, 4]
    assert dict(ranked)[2] == pytest.approx(math.log(1 + 98.5 / 2.5))
    assert dict(ranked)[4] == 0


CHANGES = st.lists(
    st.tuples(st.sampled_from(("add", "remove")), st.integers(1, 6), st.integers(1, 5)), max_size=25
)


@given(CHANGES, st.integers(1, 30))
def test_an_index_that_grows_is_at_each_version_what_it_was(
    changes: list[tuple[str, int, int]], limit: int
) -> None:
    """Whatever came and went meanwhile: a search whose transaction is older finds what it may see."""
    index, shown, next_id = GrowingIndex(), {}, 1
    views: list[tuple[VectorIndex, dict[int, list[tuple[int, int]]]]] = []
    for version, (kind, document, chunks) in enumerate(changes, start=1):
        index.remove(version, [document])
        shown = {key: rows for key, rows in shown.items() if key != document}
        if kind == "add":
            ids = np.arange(next_id, next_id + chunks)
            next_id += chunks
            angles = ids * 37 % 11
            rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("f4")
            index.add(version, np.full(chunks, document), ids, rows)
            shown = {**shown, document: list(zip(ids.tolist(), angles.tolist(), strict=True))}
        views.append((index.at(version), shown))
        if version > 1:
            assert found_by(index.at(version - 1), limit) == found_by(views[-2][0], limit)
    for view, seen in views:
        ids = [row for rows in seen.values() for row in rows]
        ranked = sorted((-float(np.float32(np.cos(angle))), key) for key, angle in ids)
        assert [key for key, _ in view.nearest(np.array([1, 0], "f4"), limit=limit)] == [
            key for _, key in ranked[:limit]
        ]


def found_by(view: VectorIndex, limit: int) -> list[int]:
    """What a view finds."""
    return [key for key, _ in view.nearest(np.array([1, 0], "f4"), limit=limit)]


def test_common_words_rank_and_rare_ones_find() -> None:
    """The rarest word always finds; the others as long as that is not too many chunks; the rest only ranks."""
    chunks_with = {"the": 90, "lock": 20, "row": 30, "absent": 0, "savepoint": 2}

    assert deciding_words(chunks_with, 55) == (["savepoint", "lock", "row"], ["the"])
    assert deciding_words(chunks_with, 1) == (["savepoint"], ["lock", "row", "the"])
    assert deciding_words(chunks_with, 1000) == (["savepoint", "lock", "row", "the"], [])
    assert deciding_words({"absent": 0}, 1000) == ([], [])


def test_what_the_rare_words_find_is_ranked_by_all_words(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every database: in their order nothing changes, only chunks without a rare word are left out."""
    for number in range(30):
        rare = "savepoint " * (number % 4) if number % 3 == 0 else ""
        common = "lock " * (number % 5 + 1)
        content = f"{rare}{common}number{number} " + "filler " * (number % 7)
        process(session, add(session, content, f"file:///{number}.txt").document_id)
    query = "savepoint lock"
    everything = rank(session, query, None, None, mode=Mode.KEYWORD).chunks
    with_rare = {passage.chunk_id for passage in passages(session, Ranking(everything, True))
                 if "savepoint" in passage.quote}  # fmt: skip

    monkeypatch.setattr(deciding_words, "__defaults__", (5,))
    found = rank(session, query, None, None, mode=Mode.KEYWORD).chunks

    assert len(everything) == 30
    assert [key for key, _ in found] == [key for key, _ in everything if key in with_rare]
    assert dict(found) == pytest.approx({key: dict(everything)[key] for key in with_rare}, rel=1e-5)


def test_only_new_vectors_are_read(
    session: Session, embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index in memory is brought up to date by what is new, and forgets what is gone, replaced or not."""
    monkeypatch.setattr(vectors, "MAX_GONE_SHARE", 1.0)  # else it would be copied, being so small
    index, read = GrowingIndex(), []
    really_add = GrowingIndex.add

    def note(self: GrowingIndex, version: int, documents: Ids, ids: Ids, added: Matrix) -> None:
        read.append(set(documents.tolist()))
        really_add(self, version, documents, ids, added)

    monkeypatch.setattr(GrowingIndex, "add", note)
    first = process(session, add(session, "one", recipe=LETTERS).document_id, embedder).id
    kept = process(session, add(session, "two", "file:///b.txt", LETTERS).document_id, embedder).id
    bring_up_to_date(session, index, embedder.name)
    unchanged = bring_up_to_date(session, index, embedder.name)
    second = process(session, add(session, "three", recipe=LETTERS).document_id, embedder).id
    replaced = bring_up_to_date(session, index, embedder.name)

    assert read == [{first, kept}, {second}]
    assert unchanged < replaced
    assert len(index.at(replaced).nearest(np.ones(26, "f4"), limit=9)) == 2
    assert set(load_index(session, embedder.name).ids.tolist()) == {
        passage.chunk_id for passage in passages(session, rank(session, "two three", None, None))
    }


def test_the_journal_is_another_version_when_what_is_found_is_another(
    session: Session, embedder: LetterEmbedder
) -> None:
    """And only then: a document that waits changes nothing for searches."""
    versions = [state(session).version]
    waiting = add(session, "one", "file:///a.txt", LETTERS).document_id
    assert state(session).version == versions[-1]
    process(session, waiting, embedder)
    versions.append(state(session).version)
    process(session, add(session, "two", "file:///a.txt", LETTERS).document_id, embedder)
    versions.append(state(session).version)
    controls.delete(session, find_document(session, "a.txt").document_id)
    versions.append(state(session).version)

    assert versions == sorted(set(versions))
    assert (state(session).chunks, state(session).words) == (0, 0)
    assert audit(session) == []


def test_the_same_text_is_shown_once_with_all_its_places(session: Session, embedder: LetterEmbedder) -> None:
    """Of two documents, and of one document that two files are: no passage says the same as another."""
    text = "The blue whale is the largest animal."
    process(session, add(session, text, "file:///a.txt", LETTERS).document_id, embedder)
    add(session, text, "file:///copy.txt", LETTERS)
    process(session, add(session, f"  {text}\n", "file:///b.txt", LETTERS).document_id, embedder)
    process(session, add(session, "A whale.", "file:///c.txt", LETTERS).document_id, embedder)

    index = load_index(session, embedder.name)
    ranking = rank(session, "blue whale", embedder.embed(["blue whale"])[0], index)
    first, second = passages(session, ranking, limit=10)

    assert [place.name for place in (first, *first.also)] == ["a.txt", "copy.txt", "b.txt"]
    assert [place.uri for place in (first, *first.also)] == [
        "file:///a.txt", "file:///copy.txt", "file:///b.txt",
    ]  # fmt: skip
    assert (second.name, second.also) == ("c.txt", ())


def test_copies_do_not_crowd_out_other_texts(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """More copies than candidates: the next text is still found."""
    monkeypatch.setattr(searching, "CANDIDATES", (5, 20, 80))
    for number in range(12):
        process(session, add(session, f"whale{' ' * number} whale", f"file:///{number}.txt").document_id)
    process(session, add(session, "One whale among many other words.", "file:///other.txt").document_id)

    found = passages(session, rank(session, "whale", None, None, mode=Mode.KEYWORD), limit=5)

    assert [len(passage.also) for passage in found] == [11, 0]
    assert found[1].name == "other.txt"


def test_what_is_neither_said_nor_meant_is_not_found(session: Session, embedder: LetterEmbedder) -> None:
    """A vector that is nearest and yet far away answers nothing; one that is near does, without the words."""
    process(session, add(session, "aaaa bbbb", recipe=LETTERS).document_id, embedder)
    index = load_index(session, embedder.name)
    far, close = embedder.embed(["zzzzqqq", "bbaa"])

    nothing = rank(session, "zzzzqqq", far, index, near=0.3)
    meant = rank(session, "bbaa", close, index, near=0.3)

    assert (nothing.chunks, nothing.has_words) == ([], False)
    assert (len(meant.chunks), meant.has_words) == (1, False)


def test_an_answer_of_nothing_says_why(embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is empty, or no word is in it, or it is not even near; and what is only near is called so."""
    monkeypatch.setattr(embedder, "near", 0.3)
    monkeypatch.setattr(retrieval, "search_embedder", lambda: (embedder, None))
    empty_index()

    empty = find("zzzzqqq", limit=3)
    with alchemy.begin() as session:
        process(session, add(session, "aaaa bbbb", recipe=LETTERS).document_id, embedder)
    nothing, by_words = find("zzzzqqq", limit=3), find("zzzzqqq", limit=3, mode=Mode.KEYWORD)
    near, found = find("bbaa", limit=3), find("aaaa", limit=3)
    empty_index()

    assert (empty.passages, empty.note) == ([], retrieval.EMPTY)
    assert (nothing.passages, nothing.note) == ([], retrieval.NOTHING_NEAR)
    assert (by_words.passages, by_words.note) == ([], retrieval.NOTHING)
    assert (len(near.passages), near.note) == (1, retrieval.ONLY_NEAR)
    assert (len(found.passages), found.note) == (1, None)


def test_what_is_only_near_is_told_from_what_has_a_word(
    embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others have a word of the query; where none has, the note says so of all."""
    monkeypatch.setattr(retrieval, "search_embedder", lambda: (embedder, None))
    empty_index()
    with alchemy.begin() as session:
        for at, content in enumerate(("whales sing", "welash gnis", "whaling songs")):
            uri = f"file:///{at}.txt"
            process(session, add(session, content, uri, recipe=LETTERS).document_id, embedder)

    def near(query: str, mode: Mode = Mode.HYBRID) -> set[str]:
        return {passage.quote for passage in find(query, limit=9, mode=mode).passages if passage.is_near}

    assert near("whale") == {"welash gnis"}
    assert near("whale", Mode.KEYWORD) == near("whale", Mode.VECTOR) == near("elahw") == set()
    empty_index()


@pytest.mark.parametrize(
    ("content", "query", "has_one"),
    [
        ("Whaling songs.", "where are the whales?", True),
        ("Where are the songs?", "where are the whales?", False),
        ("Un café", "cafe", True),
        ("鯨を見る", "白い鯨を", True),
        ("鳥を見る", "白い鯨", False),
    ],
)
def test_words_of_a_query_are_told_in_a_text(content: str, query: str, has_one: bool) -> None:
    """In their other forms too, and only those that tell what it is about."""
    assert bool(marked_spans(content, query)) is has_one


def test_searches_wait_for_no_writer() -> None:
    """On SQLite too: what another transaction has written and not committed is not seen, and holds up nobody."""
    empty_index()
    with alchemy.begin() as session:
        process(session, add(session, "about whales").document_id)

    with alchemy.begin() as writer:  # it holds the one write lock of the database
        writer.execute(update(Chunk).values(content="about zebras"))
        found = find("whales", limit=3)
        writer.rollback()
    empty_index()

    assert [passage.quote for passage in found.passages] == ["about whales"]


def test_sqlite_gives_no_id_of_a_deleted_row_again(engine_of: Callable[[str], Engine]) -> None:
    """What a process keeps by the id of a chunk or a document stands for nothing else later."""
    empty_tables(engine_of("sqlite"))
    with Session(engine_of("sqlite"), expire_on_commit=False) as session:
        first = process(session, add(session, "one").document_id).id
        controls.delete(session, first)
        session.commit()

        assert process(session, add(session, "two").document_id).id > first


def test_postgresql_tells_how_often_a_word_occurs(engine_of: Callable[[str], Engine]) -> None:
    """By `ts_rank` of that word alone, the same as counting its positions."""
    with engine_of("postgresql").connect() as connection:
        wrong = connection.execute(
            text(
                "SELECT n, width_bucket(ts_rank(to_tsvector('simple', repeat('word ', n) || repeat('x ', 70 - n)),"
                " 'word')::float8, CAST(:halfway AS float8[])) AS told FROM generate_series(0, 70) AS n"
            ),
            {"halfway": postgresql._HALFWAY},
        ).all()

    assert [(n, told) for n, told in wrong if told != min(n, postgresql.MAX_COUNT)] == []


@pytest.mark.parametrize("name", ["postgresql", "mariadb"])
def test_databases_rank_as_bm25_does(engine_of: Callable[[str], Engine], name: str) -> None:
    """The scores are those of the formula, over the chunks that searches see."""
    empty_tables(engine_of(name))
    contents = ["whale whale bee", "whale ant", "bee " * 9, "ant " * 80, "whale " * 70]
    with Session(engine_of(name), expire_on_commit=False) as session:
        for number, content in enumerate(contents):
            process(session, add(session, content, f"file:///{number}.txt").document_id)
        add(session, "whale unseen", "file:///unseen.txt")
        ids = session.scalars(select(Chunk.id).order_by(Chunk.id)).all()
        found = rank(session, "whale bee", None, None, mode=Mode.KEYWORD).chunks

    words_of = [content.split() for content in contents]
    mean = sum(len(set(content)) for content in words_of) / len(words_of)
    texts = [entry for entry in zip(ids, words_of, strict=True) if {"whale", "bee"} & set(entry[1])]
    wanted = bm25(texts, {"whale": 3, "bee": 2}, rows=5, mean_words=mean)
    assert [key for key, _ in found] == [key for key, _ in wanted]
    # Beyond 64 occurrences once more makes no difference that anybody sees.
    assert dict(found) == pytest.approx(dict(wanted), rel=5e-3)


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
