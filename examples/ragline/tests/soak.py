"""Everything at once, with workers that are killed: uploads, new versions, bad files, controls; then the accounts.

    python tests/soak.py --minutes 10 [--database URL] [--broker URL] [--seed N]

Run in a fresh home. Exit code 0 only if every document is ready, or failed for its good reason, and every file that
was not deleted is found as it was written last. `test_soak.py` runs it for a few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

FILES = 30
WORKERS = 2
PROCESSES = 2
DEADLINE_SECONDS = 300
WORDS = ("whale", "bee", "quagga", "savepoint", "transaction", "鯨")
BAD = {
    b"": "The file is empty.",
    b"\x89PNG\r\n\x1a\n" + bytes(range(256)): "This is a PNG picture",
    b"%PDF-1.7\nthis is no PDF after all\n": "The PDF is damaged",
}


class Soak:
    """One soak, in the home of the settings."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.expected: dict[str, bytes | None] = {}
        self.did: Counter[str] = Counter()
        self.workers: list[subprocess.Popen[bytes]] = []

    def run(self, seconds: float) -> list[str]:
        """Soak for so long, let all work end, and return what does not add up."""
        from ragline.app import alchemy, create_tables
        from ragline.workers import stop

        create_tables(alchemy)
        alchemy.engine.dispose()
        with ExitStack() as stack:
            stack.callback(lambda: [stop(worker) for worker in self.workers])
            self._start_workers()
            for number in range(FILES):
                self._upload(number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                act = self.chance.choices(
                    (self._upload_any, self._control, self._delete, self._kill_process, self._kill_worker),
                    weights=(8, 8, 2, 3, 1),
                )[0]
                act()
                self.did[act.__name__.strip("_")] += 1
                time.sleep(self.chance.uniform(0, 0.2))
            self._start_workers()
            return self._settle() or self._accounts()

    def _start_workers(self) -> None:
        from ragline.app import settings
        from ragline.workers import worker_arguments

        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < WORKERS:
            arguments = worker_arguments(processes=PROCESSES)
            name = f"--hostname=soak-{self.did['start']}@%h"
            self.did["start"] += 1
            with (settings.home / "worker.log").open("ab") as log:
                worker = subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "ragline.app", *arguments, name],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.workers.append(worker)

    def _upload_any(self) -> None:
        self._upload(self.chance.randrange(FILES))

    def _upload(self, number: int) -> None:
        from ragline import controls
        from ragline.app import settings
        from ragline.files import read_file
        from ragline.recipes import recipe_for
        from ragline.transactions import in_transaction

        file = self.folder / f"{number}.txt"
        if self.chance.random() < 0.1:
            data = self.chance.choice(list(BAD))
        else:
            word, length = self.chance.choice(WORDS), self.chance.randrange(5, 300)
            data = " ".join(f"Sentence {at} is about the {word}." for at in range(length)).encode()
        file.write_bytes(data)
        offer = read_file(file, max_bytes=settings.max_bytes)
        in_transaction(lambda session: controls.add(session, offer, recipe_for("none")))
        self.expected[file.as_uri()] = data

    def _control(self) -> None:
        from ragline import controls

        self._try(self.chance.choice((controls.pause, controls.resume, controls.cancel, controls.retry)))

    def _delete(self) -> None:
        from sqlalchemy import or_, select

        from ragline import controls
        from ragline.tables import Source
        from ragline.transactions import in_transaction

        def delete(session: Session) -> list[str]:
            """Delete a document; a file that waits for it, or shows it, need not be found any more."""
            document_id = self._any_document(session)
            shown = or_(Source.serving_id == document_id, Source.pending_id == document_id)
            uris = list(session.scalars(select(Source.uri).where(shown)))
            if document_id is not None:
                controls.delete(session, document_id)
            return uris

        for uri in in_transaction(delete):
            self.expected[uri] = None

    def _try(self, control: object) -> None:
        from ragline.errors import NotPossibleError
        from ragline.transactions import in_transaction

        def act(session: Session) -> None:
            document_id = self._any_document(session)
            if document_id is not None:
                control(session, document_id)  # type: ignore[operator]

        try:
            in_transaction(act)
        except NotPossibleError:
            self.did["refused"] += 1

    def _any_document(self, session: Session) -> int | None:
        from sqlalchemy import select

        from ragline.tables import Document

        ids = session.scalars(select(Document.id)).all()
        return self.chance.choice(ids) if ids else None

    def _kill_process(self) -> None:
        from ragline.workers import child_processes

        worker = self.chance.choice(self.workers)
        children = child_processes(worker.pid)
        if children:
            try:
                os.kill(self.chance.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                self.did["gone already"] += 1

    def _kill_worker(self) -> None:
        worker = self.chance.choice(self.workers)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
        self._start_workers()

    def _settle(self) -> list[str]:
        """Have everything that people stopped go on, and wait until nothing more happens."""
        from celery_alchemy.operations.dead_tasks import status
        from sqlalchemy import select

        from ragline import controls
        from ragline.app import alchemy
        from ragline.progress import measure
        from ragline.states import State
        from ragline.tables import Document
        from ragline.transactions import in_transaction

        def go_on(session: Session) -> None:
            for document_id, state in session.execute(select(Document.id, Document.state)).all():
                if state is State.PAUSED:
                    controls.resume(session, document_id)
                elif state is State.CANCELLED:
                    controls.retry(session, document_id)

        in_transaction(go_on)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with alchemy.session() as session:
                counts = measure(session)
            messages = status(alchemy.engine)
            if (
                counts.settled == counts.total
                and not messages["waiting"] + messages["owed"] + messages["leased"]
            ):
                return []
            if time.monotonic() > deadline:
                return [f"not settled in {DEADLINE_SECONDS} s: {counts}, {messages}"]
            time.sleep(0.25)

    def _accounts(self) -> list[str]:
        from sqlalchemy import select

        from ragline.app import alchemy
        from ragline.audit import audit
        from ragline.progress import failures
        from ragline.tables import Document, Source

        with alchemy.session() as session:
            problems = audit(session)
            reasons = {failure.uri: failure.reason for failure in failures(session)}
            serving = select(Source.uri, Document.digest).join(Document, Document.id == Source.serving_id)
            served = {row.uri: row.digest for row in session.execute(serving)}
        for uri, data in self.expected.items():
            if data is None:
                continue
            if data in BAD:
                if not reasons.get(uri, "").startswith(BAD[data]):
                    problems.append(f"{uri} should have failed: {BAD[data]} It has: {reasons.get(uri)}")
            elif served.get(uri) != hashlib.sha256(data).hexdigest():
                problems.append(f"{uri} is not found as it was written last: {reasons.get(uri)}")
        return problems


def main() -> int:
    """Soak in a home of its own; print what was done and what does not add up."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--database", help="URL of an empty database; a file by default")
    options.add_argument("--broker", help="URL; the database by default")
    options.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="ragline-soak-") as place:
        # Before anything reads the settings.
        settings = {
            "RAGLINE_HOME": place,
            "RAGLINE_EMBEDDER": "none",
            "RAGLINE_BATCH_CHUNKS": "4",
            "RAGLINE_REDELIVER_SECONDS": "5",
            "RAGLINE_WORKER_LOST_SECONDS": "5",
            "RAGLINE_DATABASE_URL": given.database or "",
            "RAGLINE_BROKER_URL": given.broker or "",
        }
        os.environ.update(settings)
        documents = Path(place, "documents")
        documents.mkdir()
        soak = Soak(documents, given.seed)
        problems = soak.run(given.minutes * 60)
    print(f"seed {given.seed}:", ", ".join(f"{count} {what}" for what, count in sorted(soak.did.items())))
    print("\n".join(problems) or "Everything adds up.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
