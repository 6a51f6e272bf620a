"""Names of documents: told apart by their folders, found by what a person calls them, forgotten with files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from pipelines import KEYWORDS, add, process
from ragline import controls, pruning
from ragline.audit import audit
from ragline.errors import AmbiguousNameError, NoSuchDocumentError
from ragline.files import read_file
from ragline.intake import take_in
from ragline.naming import Named, find_document, find_target, passages_lost
from ragline.places import MAX_LABEL_CHARACTERS, file_uri, labels_of
from ragline.progress import entries, failures
from ragline.reading import look
from ragline.searching import Mode, passages, rank
from ragline.tables import Document, Source


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["file:///a/x.md", "file:///a/y.md"], ["x.md", "y.md"]),
        (["file:///a/x.md", "file:///b/x.md"], ["a/x.md", "b/x.md"]),
        (["file:///a/d/x.md", "file:///b/d/x.md", "file:///b/e/x.md"], ["a/d/x.md", "b/d/x.md", "e/x.md"]),
        (["file:///x.md", "file:///a/x.md"], ["/x.md", "a/x.md"]),
        (["file:///a%1B%5B2J%0A.md", "file:///%C2%9B%E2%80%AE.md"], ["a␛[2J␊.md", "\ufffd\ufffd.md"]),
        (["upload:///x.md", "file:///a/x.md"], ["x.md", "a/x.md"]),
        (["upload:///a/x.md", "file:///b/a/x.md"], ["a/x.md", "b/a/x.md"]),
        (["file:///a%20b/%C3%A4.md", "file:///c/%C3%A4.md"], ["a b/ä.md", "c/ä.md"]),
        (
            [f"file:///{top}/{'deep/' * 20}x.md" for top in ("left", "right")],
            ["left/…/" + "deep/" * 9 + "x.md", "right/…/" + "deep/" * 9 + "x.md"],
        ),
    ],
)
def test_places_of_one_name_are_told_apart_by_their_folders(uris: list[str], names: list[str]) -> None:
    """As many folders as it takes and no more; a long way is cut in its middle."""
    assert labels_of(uris) == dict(zip(uris, names, strict=True))
    assert all(len(name) <= MAX_LABEL_CHARACTERS for name in names)


@given(st.sets(st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map(tuple), min_size=1))
def test_no_two_places_have_the_same_label(paths: set[tuple[str, ...]]) -> None:
    """Whatever folders they are in."""
    uris = [f"upload:///{'/'.join(path)}/x.md" for path in paths]

    labels = labels_of(uris)

    assert len(set(labels.values())) == len(uris)


def test_list_citation_and_failures_tell_documents_of_one_name_apart(session: Session) -> None:
    """The folder stands before the name; a document alone with its name needs none."""
    process(session, add(session, "About whales.", "file:///docs/README.md").document_id)
    process(session, add(session, "About dolphins.", "file:///lib/README.md").document_id)
    process(session, add(session, "About whales and dolphins.", "file:///lib/sea.md").document_id)

    names = [entry.name for entry in entries(session, limit=9)]
    found = passages(session, rank(session, "whales", None, None, mode=Mode.KEYWORD))

    assert names == ["sea.md", "lib/README.md", "docs/README.md"]
    assert {passage.citation.partition(",")[0] for passage in found} == {"sea.md", "docs/README.md"}
    assert failures(session) == []


def test_a_page_that_watches_sees_names_told_apart_when_another_comes(session: Session) -> None:
    """The first document of a name gets its folder when the second comes, and loses it when that goes."""
    first = add(session, "one", "file:///docs/README.md").document_id
    alone = look(session, limit=9)
    second = add(session, "two", "file:///lib/README.md").document_id
    both = look(session, alone, limit=9)
    controls.delete(session, second)
    session.commit()
    again = look(session, both, limit=9)

    assert alone.documents[first].name == again.documents[first].name == "README.md"
    assert [both.documents[key].name for key in (first, second)] == ["docs/README.md", "lib/README.md"]


def test_a_name_of_several_documents_is_refused(session: Session) -> None:
    """With what to say instead, and each way of saying it finds the one that is meant."""
    first = add(session, "one", "file:///docs/README.md").document_id
    second = add(session, "two", "file:///lib/README.md").document_id

    with pytest.raises(AmbiguousNameError) as refused:
        find_document(session, "README.md")

    assert str(refused.value) == (
        f"2 documents are called README.md: docs/README.md ({first}), lib/README.md ({second})."
        " Name one as it stands here, by its path, or by its id."
    )
    for reference in ("docs/README.md", "./docs/README.md", "/docs/README.md", str(first)):
        assert find_document(session, reference).document_id == first
    with pytest.raises(NoSuchDocumentError):
        find_document(session, "ocs/README.md")


def test_a_name_is_not_ambiguous_for_one_document(session: Session) -> None:
    """A copy in another folder is the same document, and a generation under way is of the same place."""
    found = process(session, add(session, "one", "file:///docs/README.md").document_id).id
    add(session, "one", "file:///lib/README.md")
    assert find_document(session, "README.md").document_id == found

    newer = add(session, "two", "file:///a.txt").document_id
    newest = add(session, "three", "file:///a.txt").document_id
    process(session, newest)
    assert find_document(session, "a.txt").document_id == newest
    assert newer != newest


def test_a_copy_is_deleted_in_the_place_that_is_named(session: Session) -> None:
    """By path or label: the other places keep the document. A name of several places is refused."""
    uris = [f"file:///{folder}/same.txt" for folder in "abc"]
    ready = process(session, add(session, "one", uris[0]).document_id).id
    for uri in uris[1:]:
        add(session, "one", uri)

    target = find_target(session, "b/same.txt")
    with pytest.raises(AmbiguousNameError, match=r"^3 places are called same.txt: a/same.txt \(\d+\), b/sam"):
        find_target(session, "same.txt")
    controls.delete_targets(session, [target])
    session.commit()

    assert (target.label, target.document_ids, target.others) == ("b/same.txt", (ready,), 2)
    assert set(session.scalars(select(Source.uri))) == {uris[0], uris[2]}
    assert find_document(session, "c/same.txt") == Named(ready, "c/same.txt", 1)
    assert audit(session) == []


def test_an_id_deletes_a_document_from_all_its_places(session: Session) -> None:
    """Also where one of them is named beside it."""
    uris = [f"file:///{folder}/same.txt" for folder in "abc"]
    (document_id,) = {add(session, "one", uri).document_id for uri in uris}

    by_id, by_path = (find_target(session, name) for name in (str(document_id), "/b/same.txt"))
    controls.delete_targets(session, [by_path, by_id])

    assert (by_id.label, by_id.others) == ("a/same.txt", 2)
    assert session.scalars(select(Source.id)).all() == session.scalars(select(Document.id)).all() == []


def test_what_is_lost_is_what_no_other_place_keeps(session: Session) -> None:
    """Passages are counted once, whoever names them, and those of another place stay."""
    process(session, add(session, "one", "file:///a/same.txt").document_id)
    shared = add(session, "one", "file:///b/same.txt").document_id
    process(session, add(session, "two", "file:///b/other.txt").document_id)
    targets = {name: find_target(session, name) for name in ("/a/same.txt", "/b", "other.txt", str(shared))}

    def lost(*names: str) -> int:
        return passages_lost(session, [targets[name] for name in names])

    assert (lost("/a/same.txt"), lost("/b"), lost(str(shared))) == (0, 1, 1)
    assert (lost("/a/same.txt", "/b"), lost("/b", "other.txt", str(shared))) == (2, 2)
    assert lost() == 0


@pytest.mark.parametrize("folder", ["/docs/d", "/docs/d/", "file:///docs/d", "up"])
def test_a_folder_is_deleted_with_all_below_it(session: Session, folder: str) -> None:
    """Not with what only begins like it; other controls know no folders."""
    for uri in ("/docs/d/a.md", "/docs/d/e/b.md", "/docs/dup.md", "/docs/D/a.md"):
        add(session, uri, f"file://{uri}")
    add(session, "c", "upload:///up/c.md")
    add(session, "d", "upload:///up/d.md")

    target = find_target(session, folder)
    controls.delete_targets(session, [target])

    assert (target.is_folder, len(target.source_ids or ())) == (True, 2)
    assert len(session.scalars(select(Source.id)).all()) == 4
    with pytest.raises(NoSuchDocumentError):
        find_document(session, "/docs")


def test_what_is_done_for_a_place_is_done_for_its_next_generation(session: Session) -> None:
    """The one that is found is ready, and cannot be paused: the person means the other."""
    found = process(session, add(session, "about whales").document_id).id
    under_way = add(session, "about dolphins").document_id

    named = find_document(session, "a.txt")
    target = find_target(session, "a.txt")

    assert named == Named(under_way, "a.txt", 0)
    assert target.document_ids == (found, under_way)


@pytest.mark.parametrize("find", [find_document, find_target])
def test_a_name_of_many_documents_costs_a_few_statements(
    session: Session, find: Callable[[Session, str], object]
) -> None:
    """However many there are."""
    for number in range(30):
        add(session, str(number), f"file:///{number}/README.md")
    sent: list[str] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *given: sent.append(given[2]))

    with pytest.raises(AmbiguousNameError, match="and 20 more"):
        find(session, "README.md")

    assert len(sent) < 9


@pytest.mark.parametrize("number", ["99", "9" * 40])
def test_a_number_that_is_no_id_is_no_document(session: Session, number: str) -> None:
    """Also one that no database can compare."""
    with pytest.raises(NoSuchDocumentError):
        find_document(session, number)


def test_a_relative_path_names_the_file_that_is_there(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way it goes; also where other folders have a file of that name."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("one")
    (tmp_path / "docs" / "README.md").write_text("two")
    monkeypatch.chdir(tmp_path / "docs")
    outcomes = [
        take_in(session, read_file(Path(path), max_bytes=99), KEYWORDS).document_id
        for path in ("../README.md", "README.md", "../docs/README.md", str(tmp_path / "README.md"))
    ]
    session.commit()

    assert outcomes == [outcomes[0], outcomes[1], outcomes[1], outcomes[0]]
    assert {find_document(session, name).document_id for name in ("README.md", "./README.md")} == {
        outcomes[1]
    }
    assert find_document(session, "../README.md").document_id == outcomes[0]


def test_a_link_to_a_folder_is_the_folder(tmp_path: Path) -> None:
    """One file is one place, by whatever way the path leads there; a linked file keeps its name."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "v3.md").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "latest.md").symlink_to(tmp_path / "real" / "v3.md")

    assert file_uri(tmp_path / "link" / "v3.md") == file_uri(tmp_path / "real" / "v3.md")
    assert file_uri(tmp_path / "real" / ".." / "latest.md") == (tmp_path / "latest.md").as_uri()


def test_a_name_in_no_encoding_is_taken(session: Session, tmp_path: Path) -> None:
    """No database stores such a name: it is shown with a mark, and its file is still found."""
    path = os.fsencode(tmp_path) + b"/caf\xe9.md"
    Path(os.fsdecode(path)).write_text("About whales.")

    take_in(session, read_file(Path(os.fsdecode(path)), max_bytes=99), KEYWORDS)
    session.commit()

    (entry,) = entries(session, limit=9)
    assert entry.name == "caf\ufffd.md"
    assert pruning.find_gone(session, [tmp_path]) == []


def test_documents_of_files_that_are_gone_are_forgotten(session: Session, tmp_path: Path) -> None:
    """Only those below the folders that are named; a copy that is there keeps its document."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs2").mkdir()
    for name, content in (("gone.md", "one"), ("kept.md", "two"), ("copied.md", "three")):
        (tmp_path / "docs" / name).write_text(content)
    (tmp_path / "docs2" / "copy.md").write_text("three")
    (tmp_path / "docs2" / "gone.md").write_text("four")
    for file in sorted(tmp_path.glob("*/*.md")):
        process_new(session, file)
    for name in ("docs/gone.md", "docs/copied.md", "docs2/gone.md"):
        (tmp_path / name).unlink()

    gone = pruning.find_gone(session, [tmp_path / "docs"])
    pruning.forget(session, gone)
    session.commit()

    assert [Path(one.path).name for one in gone] == ["copied.md", "gone.md"]
    names = session.scalars(select(Source.name).order_by(Source.name)).all()
    assert names == ["copy.md", "gone.md", "kept.md"]
    assert len(session.scalars(select(Document)).all()) == 3
    assert audit(session) == []
    assert len(pruning.find_gone(session, [tmp_path])) == 1
    assert len(pruning.find_gone(session, [tmp_path / "docs2" / "gone.md"])) == 1


def process_new(session: Session, file: Path) -> None:
    """Take a file in and make it ready, unless its bytes are known."""
    outcome = take_in(session, read_file(file, max_bytes=99), KEYWORDS)
    session.commit()
    if outcome.is_queued:
        process(session, outcome.document_id)
