"""A question that is one address, number or path: passages that have exactly it go first."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import LETTERS, add, process, until_embedding
from ragline.question import question_of
from ragline.searching import Mode, load_index, passages, rank

AROUND = " Whoever reads this far finds more that has nothing to do with it, and then the end of the passage."
TEXTS = (
    # Words more often, in fewer words, and letters in the same proportion: first by words, and near.
    "jane doe, jane doe, example com: jane example doe com, jane com",
    "err 12, err 13, err err: 4711 pieces, 4711",
    "etc etc, ragline env, ragline etc, env env",
    "snake, case, case, snake",
    "Write to jane.doe@example.com when it fails." + AROUND,
    "The log says ERR-4711 when it fails." + AROUND,
    "The settings are in /etc/ragline.env when it fails." + AROUND,
    "The name is snake_case when it fails." + AROUND,
)
QUESTIONS = {"jane.doe@example.com": 4, "ERR-4711": 5, "err-4711?": 5, "/etc/ragline.env": 6, "snake_case": 7}


@pytest.fixture
def filled(session: Session, embedder: LetterEmbedder) -> Session:
    """A session on an index with these texts."""
    for number, content in enumerate(TEXTS):
        process(session, add(session, content, f"file:///{number}.txt", LETTERS).document_id, embedder)
    return session


def found(session: Session, asked: str, mode: Mode) -> list[int]:
    """The numbers of the texts that are found, in their order; their scores are in this order too."""
    embedder = LetterEmbedder()
    question = question_of(asked)
    vector, index = embedder.embed([question.text])[0], load_index(session, embedder.name)
    listed = passages(session, rank(session, question, vector, index, mode=mode))
    scores = [passage.score for passage in listed]
    assert scores == sorted(scores, reverse=True)
    return [TEXTS.index(passage.quote) for passage in listed]


@pytest.mark.parametrize("mode", [Mode.HYBRID, Mode.KEYWORD])
def test_what_has_exactly_an_identifier_goes_first(filled: Session, mode: Mode) -> None:
    """Who types an address or a number of an error wants the passage with it, not one that has its parts more often."""
    assert {asked: found(filled, asked, mode)[0] for asked in QUESTIONS} == QUESTIONS


def test_all_else_is_found_behind_it_in_the_same_order(filled: Session) -> None:
    """What has some of its words, and what is near in meaning, may be what was meant after all."""
    apart = found(filled, "err 4711", Mode.HYBRID)

    assert found(filled, "err-4711", Mode.HYBRID) == [5, *(number for number in apart if number != 5)]


@pytest.mark.parametrize(
    ("asked", "identifier"),
    [
        ("jane.doe@example.com", "jane.doe@example.com"),
        (" ERR-4711? ", "ERR-4711"),
        ("/usr/lib/python3/", "usr/lib/python3"),
        ("C:\\Windows", "C:\\Windows"),
        ("snake_case", "snake_case"),
        ("4711", "4711"),
        ("session.commit()", "session.commit"),
        ("ERR-4711 -draft", "ERR-4711"),
        ("whales", None),
        ("whales?", None),
        ("boundary-layer", None),
        ("don't", None),
        ("what is ERR-4711", None),
        ("数据库的事务", None),
        ("...", None),
        ("", None),
    ],
)
def test_identifiers_are_told_from_words(asked: str, identifier: str | None) -> None:
    """One thing without spaces that has a digit, or signs inside that words have not."""
    assert question_of(asked).identifier == identifier


def test_words_next_to_each_other_are_no_identifier(filled: Session) -> None:
    """With other signs between them they are something else, and rank as any other words."""
    assert found(filled, "case/snake", Mode.HYBRID)[0] == 3
    assert found(filled, "snake.case", Mode.KEYWORD)[0] == 3


def test_documents_that_are_not_ready_are_not_found(session: Session) -> None:
    """Their words are indexed, and not yet counted: a database knows the identifier and none of its words."""
    process(session, add(session, "Something that is ready.", "file:///b.txt").document_id)
    until_embedding(session, add(session, TEXTS[5], recipe=LETTERS).document_id)

    ranking = rank(session, question_of("ERR-4711"), None, None, mode=Mode.KEYWORD)

    assert (ranking.chunks, ranking.has_words) == ([], False)
