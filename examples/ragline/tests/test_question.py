"""Questions with exact words in quotation marks and words to leave out, and what each database finds for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from conftest import LetterEmbedder
from pipelines import LETTERS, add, empty_index, process
from ragline import asking, cli, retrieval, searching
from ragline.app import alchemy
from ragline.databases import index_of
from ragline.endpoints import Endpoint
from ragline.question import ONLY_EXCLUDED, TOO_MANY, Question, question_of
from ragline.retrieval import find
from ragline.searching import Mode, load_index, passages, rank
from ragline.words import marked_spans, words


@pytest.mark.parametrize(
    ("asked", "text", "phrases", "excluded"),
    [
        ('the "blue whale" sings', "the blue whale sings", ("blue whale",), ()),
        ("“blue whale” and „humpback”", "blue whale and humpback", ("blue whale", "humpback"), ()),
        ("whales -blue", "whales", (), ("blue",)),
        ("-blue whales -well-known, too", "whales too", (), ("blue", "well-known,")),
        ('whales -"blue whale"', "whales", (), ("blue whale",)),
        ('"a -b" c', "a -b c", ("a -b",), ()),
        ('关于"事务隔离"的问题 -回滚', "关于 事务隔离 的问题", ("事务隔离",), ("回滚",)),
        ("-blue", "", (), ("blue",)),
    ],
)
def test_a_question_is_taken_apart(
    asked: str, text: str, phrases: tuple[str, ...], excluded: tuple[str, ...]
) -> None:
    """What is embedded has neither the signs nor the words that are left out."""
    assert question_of(asked) == Question(text, phrases, excluded)


@pytest.mark.parametrize(
    "asked",
    [
        "how do savepoints behave?", "well-known words", "a - b", "5 -5 -3.14 -½ -1e5", "--no-wait", "a-b -",
        'an 8" disk', '"', 'a "" b "?!" c', "-(x) -_y -- ---", "  two\n spaces ", "a-\"", "don't -'x'", "–dash −minus",
    ],
)  # fmt: skip
def test_what_is_no_operator_is_plain_text(asked: str) -> None:
    """To the letter: nothing changes for a question without operators."""
    assert question_of(asked) == Question(asked)


@given(st.text(alphabet='ab -"“5\n\x00', max_size=20) | st.text(max_size=40))
def test_any_text_is_a_question(asked: str) -> None:
    """Nothing is lost but signs and what is left out, and what is demanded has words."""
    question = question_of(asked)

    assert all(map(words, question.phrases + question.excluded))
    if not question.excluded:
        assert words(question.text) == words(asked)


def test_words_that_are_left_out_are_not_marked() -> None:
    """They are in no passage; those in quotation marks are."""
    text = "The blue whale sings, dancing."
    spans = marked_spans(text, 'the "blue whale" sings -dancing')
    assert [text[start:end] for start, end in spans] == ["blue", "whale", "sings"]


TEXTS = (
    "The blue whale sings in the deep sea.",
    "A whale is blue; the sea is deep.",
    "Blue whales and humpbacks are singing.",
    "A humpback of the sea sings to a whale.",
    "数据库的事务隔离由它保证。",
    "隔离级别与事务的回滚。",
    "We run 2fa and session.commit() in a row.",
    "To be or not to be, that is the question of the whale.",
)


@pytest.fixture
def filled(session: Session, embedder: LetterEmbedder) -> Session:
    """A session on an index with these texts."""
    for number, content in enumerate(TEXTS):
        process(session, add(session, content, f"file:///{number}.txt", LETTERS).document_id, embedder)
    return session


def found(session: Session, asked: str, mode: Mode = Mode.HYBRID) -> list[int]:
    """The numbers of the texts that are found, in their order."""
    embedder = LetterEmbedder()
    question = question_of(asked)
    vector, index = embedder.embed([question.text])[0], load_index(session, embedder.name)
    ranking = rank(session, question, vector, index, mode=mode)
    return sorted(TEXTS.index(passage.quote) for passage in passages(session, ranking))


EXACT = {
    '"BLUE whale"': [0, 2],  # as the index has it, by stems
    '"blue whale" humpback': [0, 2],
    'sea "blue whale" -singing': [],
    'whale "the deep sea" "blue whale"': [0],
    '"whale blue"': [],
    '"事务隔离"': [4],
    '"session commit"': [6],
    '"to be or not to be"': [7],
    'humpback "to be or not to be"': [7],
    '"absent words" whale': [],
}


def test_exact_words_are_in_every_passage(filled: Session) -> None:
    """In this order and next to each other, also in what the vectors find."""
    for mode in Mode:
        assert {asked: found(filled, asked, mode) for asked in EXACT} == EXACT


WITHOUT = {  # what the words find, and what is left out
    "whale -blue": ([3, 7], [0, 1, 2]),
    "whale -dances": ([0, 1, 2, 3, 7], []),
    "whale -sing": ([1, 7], [0, 2, 3]),
    'whale -"blue whale"': ([1, 3, 7], [0, 2]),
    "whale -well-known -session.commit": ([0, 1, 2, 3, 7], [6]),
    "事务 -回滚": ([4], [5]),
    '"事务" -隔离': ([], [0, 1, 2, 3, 4, 5, 6, 7]),
    "whale -the -to": ([2], [0, 1, 3, 7]),
    "whale -whale": ([], [0, 1, 2, 3, 7]),
}


def test_words_with_a_minus_are_in_no_passage(filled: Session) -> None:
    """By the same stems; the vectors find all others."""
    every = set(range(len(TEXTS)))
    by_words = {asked: words_find for asked, (words_find, _) in WITHOUT.items()}
    others = {asked: sorted(every - set(left_out)) for asked, (_, left_out) in WITHOUT.items()}

    assert {asked: found(filled, asked, Mode.KEYWORD) for asked in WITHOUT} == by_words
    assert {asked: found(filled, asked, Mode.VECTOR) for asked in WITHOUT} == others
    assert {asked: found(filled, asked) for asked in WITHOUT} == others


def test_as_many_are_found_as_there_are(
    session: Session, embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out, and what lacks the exact words, takes no place among the candidates of either way."""
    monkeypatch.setattr(searching, "CANDIDATES", (10,))
    monkeypatch.setattr(index_of(session.connection()), "CANDIDATES", 10, raising=False)
    content = "\n\n".join(
        ["whale whale whale blue"] * 40 + [f"A whale, number {at}, is far from it" for at in range(12)]
    )
    for at, line in enumerate(content.split("\n\n")):
        process(session, add(session, f"{line} {at}", f"file:///{at}.txt", LETTERS).document_id, embedder)
    index, vector = load_index(session, embedder.name), embedder.embed(["whale"])[0]

    for asked, mode in product(("whale -blue", '"far from it" whale'), Mode):
        ranking = rank(session, question_of(asked), vector, index, mode=mode)
        quotes = [passage.quote for passage in passages(session, ranking, limit=10)]
        assert len(quotes) == 10
        assert all("far from it" in quote for quote in quotes)


PARTS = st.sampled_from(
    ["whale", "blue", "deep", "sea", "the", "事务", "隔离", "session", "commit", '"', "“", " ", " -", '-"', "NEAR", "*",
     "(", ")", ":", "'", "\\", "\x00", "\ud800", "AND", "OR", "NOT", "^", "+", "~", "%", "_", "&", "|", "!", "<->", "@", "-5", "ß", "é"]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(PARTS, max_size=14).map("".join) | st.text(max_size=60))
def test_every_question_finds_what_it_says(filled: Session, asked: str) -> None:
    """No sign makes a database fail or read it otherwise; each passage has the exact words and none that is left out."""
    question = question_of(asked)

    def has(quote: str, phrase: str) -> bool:
        return f" {' '.join(stems(phrase))} " in f" {' '.join(stems(quote))} "

    for mode in Mode:
        for number in found(filled, asked, mode):
            assert all(has(TEXTS[number], phrase) for phrase in question.phrases)
            assert not any(has(TEXTS[number], phrase) for phrase in question.excluded)


def stems(text: str) -> list[str]:
    """The words of a text without the endings that these texts have."""
    return [word.removesuffix("s").removesuffix("ing") for word in words(text)]


@pytest.mark.parametrize(
    ("form", "is_found"), [("{}", True), ('"{}"', False), ('word1 -"{}"', True), ("{} -word1", False)]
)
def test_ten_thousand_words_are_a_question(session: Session, form: str, is_found: bool) -> None:
    """All in the index: as words, as a phrase, as what is left out."""
    some = " ".join(f"word{number}" for number in range(10_000))
    first = " ".join(some.split()[:50])
    process(session, add(session, first if "-word1" in form else some).document_id)

    ranking = rank(session, question_of(form.format(some)), None, None, mode=Mode.KEYWORD)

    assert bool(ranking.chunks) is is_found


def test_thousands_of_operators_are_refused() -> None:
    """With a sentence: no database has to bear them."""
    for signs in ("a -b " * 51, '"a" ' * 51):
        assert question_of(signs).refusal == TOO_MANY
    assert question_of("a -b " * 50).refusal is None


@pytest.fixture
def answering(embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The app's own index, filled, and searched with letters."""
    monkeypatch.setattr(retrieval, "search_embedder", lambda: (embedder, None))
    monkeypatch.setattr(retrieval, "_indexes", retrieval._Indexes())  # the versions of this index are its own
    empty_index()
    with alchemy.begin() as session:
        process(session, add(session, "The blue whale sings.", recipe=LETTERS).document_id, embedder)
    yield
    empty_index()


@pytest.mark.usefixtures("answering")
def test_what_is_embedded_has_no_signs(embedder: LetterEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the words that are to be left out."""
    embedded: list[str] = []
    really_embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda texts: (embedded.extend(texts), really_embed(texts))[1])

    result = find('the "blue whale" -humpback', limit=3)

    assert embedded == ["the blue whale"]
    assert [passage.quote for passage in result.passages] == ["The blue whale sings."]


@pytest.mark.usefixtures("answering")
def test_why_nothing_is_found_is_said_of_the_operators_too() -> None:
    """Else it would seem that no passage had a word of the question."""
    notes = [find(asked, limit=3).note for asked in ('"whale blue"', "whale -sings", '"whale blue" -cat')]

    without = "without the words that are left out"
    assert notes == [
        "Nothing found: no passage has the words in quotation marks next to each other in this order.",
        f"Nothing found: no passage {without} has a word of the query, and none is near it in meaning.",
        f"Nothing found: no passage {without} has the words in quotation marks next to each other in this order.",
    ]


def test_the_command_line_refuses_what_only_excludes_and_tells_the_signs() -> None:
    """As any argument that cannot be used; the help has both signs."""
    told = CliRunner().invoke(cli.cli, ["search", "--help"], env={"COLUMNS": "300"})
    refused = CliRunner().invoke(cli.cli, ["search", "--", "-blue"], env={"COLUMNS": "300"})

    assert (refused.exit_code, told.exit_code) == (2, 0)
    assert ONLY_EXCLUDED in refused.output
    assert '"quotation marks"' in told.output
    assert "whales -blue" in told.output


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("asked", ["-whale", '-"blue whale" -cat ?'])
def test_a_question_of_exclusions_only_is_refused(asked: str) -> None:
    """With a sentence; a language model is not asked either."""
    answered = asking.answer(asked, endpoint=Endpoint("http://127.0.0.1:1", "never-asked"))

    assert (find(asked, limit=3).passages, find(asked, limit=3).note) == ([], ONLY_EXCLUDED)
    assert answered.notes == [ONLY_EXCLUDED, "Nothing was found, so no model was asked."]


@pytest.mark.parametrize(
    ("query", "text", "marked"),
    [
        (
            "C++ templates",
            "C can check templates; a template is templated.",
            "C templates template templated",
        ),
        ("how are locks released", "LockNotOwnedError: a lock releases.", "lock releases"),
        ("cafe", "Cafés, cafe\u0301 and cafeteria", "Cafés cafe\u0301"),
        ("strasse", "Straße, STRASSE und Wasserstraße", "Straße STRASSE"),
        ("STRAẞE", "Strasse und Straße", "Strasse Straße"),
        ("use of art", "The use of arts by artists", "use arts"),
        ("running dances", "run, runner; dance, dancing; rundown", "run runner dance dancing"),
        ("queries class boxes", "query classes box boxcar clasp", "query classes box"),
        ("using", "We use what others used; a user uses us.", "use used uses"),
        ("use", "used, using, use_59 and useful", "used using use useful"),
        ("happy plans", "happier, happily planning a plane", "happier happily planning"),
        (
            "write a plan",
            "The writer writes on planes; writing a plan, planner",
            "writer writes writing plan planner",
        ),
        ("dying", "It dies; he died on a die", "dies died die"),
        ("migrate parsing", "migrations, parser; migrant", "migrations parser"),
        ("vacuum", "vacuum_cost vacuuming", "vacuum vacuuming"),
        ("SELECT * FROM t", "a tsquery: SELECT t", "SELECT t"),
        ("蜜蜂舞蹈", "关于蜜蜂的舞蹈", "蜜蜂 舞蹈"),
        ("the of", "of the sea", ""),
        ("-sea bees", "bees at sea", "bees"),
    ],
)
def test_whole_words_are_marked_in_all_their_forms(query: str, text: str, marked: str) -> None:
    """And nothing that only begins like one."""
    assert " ".join(text[start:end] for start, end in marked_spans(text, query)) == marked
