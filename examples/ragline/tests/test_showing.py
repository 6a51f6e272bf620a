"""`ragline show`: what is known of a document, and its text."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from letters import LetterEmbedder
from pipelines import LETTERS, add, empty_index, process
from ragline.app import alchemy
from ragline.errors import ConfigurationError, NoSuchDocumentError
from ragline.presentation import LISTED, list_documents
from ragline.progress import Order
from ragline.showing import show

TEXT = "# Whales\n\nThe blue\twhale \x1b[31msings.\n\nIt dives."


@pytest.fixture(autouse=True)
def document(embedder: LetterEmbedder) -> str:
    """A document that is ready; its id."""
    empty_index()
    with alchemy.begin() as session:
        number = add(session, TEXT, "file:///docs/whale.md", recipe=LETTERS).document_id
        process(session, number, embedder)
    return str(number)


def shown(reference: str, *, is_terminal: bool = False, **options: object) -> tuple[str, str, bool]:
    """What goes out, what goes beside it, and whether there was a text."""
    text, rest = StringIO(), StringIO()
    is_there = show(
        reference,
        Console(file=text, force_terminal=is_terminal, width=200),
        Console(file=rest, width=200),
        **options,  # type: ignore[arg-type]
    )
    return text.getvalue(), rest.getvalue(), is_there


def test_a_document_is_shown_by_id_name_or_path(document: str) -> None:
    """The text alone goes out, for a program or a file; what is known of the document stands beside it."""
    for reference in (document, "whale.md", "/docs/whale.md"):
        text, rest, is_there = shown(reference)

        assert is_there
        assert text.endswith("It dives.\n")
        assert "blue\twhale" in text
        assert rest.splitlines()[0] == f"whale.md ({document})"
        assert "ready" in rest
        assert "/docs/whale.md" in rest


@pytest.mark.parametrize(("characters", "part"), [("2-8", "Whales\n"), ("2–8", "Whales\n"), ("2-1,000", "")])
def test_a_part_is_shown_as_search_results_name_it(characters: str, part: str) -> None:
    """Also with the page's dash and commas; behind the end there is nothing."""
    text = shown("whale.md", characters=characters)[0]

    assert text == part or (not part and text.startswith("Whales") and text.endswith("dives.\n"))


@pytest.mark.parametrize("characters", ["9-3", "a-b", "5"])
def test_what_is_no_range_is_refused(characters: str) -> None:
    """In a sentence, before anything is read."""
    with pytest.raises(ConfigurationError, match="no range"):
        shown("whale.md", characters=characters)


def test_a_terminal_is_told_nothing_by_a_document() -> None:
    """What would turn its colours, or worse, is shown as signs."""
    text, _, _ = shown("whale.md", is_terminal=True)

    assert "\x1b" not in text


def test_a_document_without_text_says_why() -> None:
    """With the exit code of a failure."""
    with alchemy.begin() as session:
        add(session, "Not read yet.", "file:///docs/early.md", recipe=LETTERS)

    text, rest, is_there = shown("early.md")

    assert (text, is_there) == ("", False)
    assert rest.endswith("Its text is not read yet.\n")


def test_a_program_gets_all_of_it_as_json(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With headings and the times at which its states were reached."""
    shown(document, as_json=True)

    told = json.loads(capsys.readouterr().out)
    assert told["text"].startswith("# Whales")
    assert (told["id"], told["characters"]) == (int(document), len(told["text"]))
    assert [heading["title"] for heading in told["headings"]] == ["Whales"]
    assert "ready" in told["reached"]


def test_a_document_that_is_not_there_is_told() -> None:
    """As all commands tell it."""
    with pytest.raises(NoSuchDocumentError):
        shown("nothing.md")


def test_a_program_gets_the_list_of_all_documents(capsys: pytest.CaptureFixture[str]) -> None:
    """A person gets the newest, and is told how many more there are; nothing would tell a program."""
    empty_index()
    with alchemy.begin() as session:
        for number in range(LISTED + 2):
            add(session, f"Text {number}.", f"file:///docs/{number}.md", recipe=LETTERS)
    table = StringIO()

    list_documents(None, "", Order.NEWEST, None, Console(file=table), as_json=False)
    list_documents(None, "", Order.NEWEST, None, Console(file=table), as_json=True)
    every = json.loads(capsys.readouterr().out)
    list_documents(None, "", Order.NEWEST, 3, Console(file=table), as_json=True)
    some = json.loads(capsys.readouterr().out)

    assert table.getvalue().endswith("2 more: `--limit 52` shows all.\n")
    assert (len(every), len(some)) == (LISTED + 2, 3)
