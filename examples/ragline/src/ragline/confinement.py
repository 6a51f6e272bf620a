"""Parsing in processes that can be ended: a document that takes too much fails alone, with its reason.

A process is started when the first document comes, reused while it is well and replaced when it is
not. It is no child of `multiprocessing`: the processes of Celery's prefork pool are daemonic, and may
have none.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from ragline.errors import CrashedError, DocumentError, ParserError, TooSlowError
from ragline.limits import Limits
from ragline.parsers.confined import CLOCK_FACTOR, FRAME, LENGTH
from ragline.text import Block, Heading, Kind, ParsedText

GRACE_SECONDS = 10
"""Beyond the process's own limit of the clock: only one that is stopped takes so long."""
_BLOCK_BYTES = 1 << 20
# Documents come from anywhere: what parses them sees no keys and no passwords.
_ENVIRONMENT = (
    "PATH LANG LC_ALL LC_CTYPE TZ TMPDIR HOME PYTHONPATH PYTHONHOME VIRTUAL_ENV LD_LIBRARY_PATH SYSTEMROOT"
).split()
# A crash is the document's doing and comes again; the others are somebody's who ends processes.
_CRASHES = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
)
_TIMERS = frozenset((signal.SIGPROF, signal.SIGALRM))


# By name, as the process tells them.
_REASONS = {kind.__name__: kind for kind in DocumentError.__subclasses__()}

logger = logging.getLogger(__name__)


class _LostError(Exception):
    """The process is gone, and nobody knows whether the document has to do with it."""


class _Process:
    """A process that parses one document after another."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ragline.parsers.confined", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A forked child that closes its copies of the pipes must have nothing left to flush into them.
            bufsize=0,
            # Modules of the working directory are not what is meant; arenas and threads cost address space.
            env=environment | {"PYTHONSAFEPATH": "1", "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1"},
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def parse(self, data: bytes, name: str) -> dict[str, Any]:
        """Have a document parsed.

        Raises:
            DocumentError: it took too long, or crashed its parser.
            _LostError: the process is gone for another reason.
        """
        encoded = name.encode("utf-8", "surrogateescape")
        stdin, stdout = self._pipes()
        try:
            self._write(stdin, FRAME.pack(len(encoded), len(data)) + encoded)
            self._write(stdin, data)
            deadline = time.monotonic() + self._limits.seconds * CLOCK_FACTOR + GRACE_SECONDS
            (length,) = LENGTH.unpack(self._read(stdout, LENGTH.size, deadline))
            answer: dict[str, Any] = json.loads(self._read(stdout, length, deadline))
        except (BrokenPipeError, EOFError):
            raise self._end_of() from None
        return answer

    def end(self) -> int:
        """End it, and give back its exit code."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self.close()
        return self._process.wait()

    def close(self) -> None:
        """Close this process's ends of the pipes, by which the other one knows that it may end."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("The process was started without pipes.")
        return self._process.stdin, self._process.stdout

    def _write(self, stream: IO[bytes], data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[stream.write(left) :]

    def _read(self, stream: IO[bytes], size: int, deadline: float) -> bytes:
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(deadline - time.monotonic()):
                    raise TooSlowError.over(self._limits.seconds)
                block = os.read(stream.fileno(), min(size - len(data), _BLOCK_BYTES))
                if not block:
                    raise EOFError
                data += block
        return bytes(data)

    def _end_of(self) -> DocumentError | _LostError:
        code = self._process.wait()
        ended_by = signal.Signals(-code) if code < 0 else None
        if ended_by in _TIMERS:
            return TooSlowError.over(self._limits.seconds)
        if ended_by in _CRASHES:
            return CrashedError(
                f"It crashes its parser ({ended_by.name}): the file is damaged, or made to do so."
            )
        return _LostError(f"exit code {code}" if ended_by is None else ended_by.name)


class Confinement:
    """Parses documents, each in a process with limits; of as many processes as threads ask at once.

    Args:
        limits: what one document may cost.

    Guarantees:
        Safe to call from several threads, and behind a fork. The processes end with this one.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run."""
        with self._lock:
            return sorted(process.pid for process in self._all)

    def parse(self, data: bytes, name: str) -> ParsedText:
        """Parse a document of any supported format.

        Args:
            data: all of its bytes.
            name: its file name, used for the extension where the bytes do not tell.

        Raises:
            DocumentError: one of its kinds, with a reason for the person who added the document.
            ParserError: a parser has failed in a way that nobody foresaw; it can be tried again.
        """
        try:
            answer = self._answer(data, name)
        except _LostError:
            # Somebody ended the process, or the machine was short of memory: a second one will tell.
            try:
                answer = self._answer(data, name)
            except _LostError as error:
                raise ParserError(f"The process that parses it was ended twice ({error}).") from error
        if "parsed" in answer:
            return _text(answer["parsed"])
        if "trace" in answer:
            logger.error("The parser of %s failed:\n%s", name, answer["trace"])
            raise ParserError(answer["reason"])
        raise _REASONS[answer["error"]](answer["reason"])

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            ended, self._all, self._idle = self._all, set(), []
        for process in ended:
            process.end()

    def _answer(self, data: bytes, name: str) -> dict[str, Any]:
        process = self._taken()
        is_well = False
        try:
            answer = process.parse(data, name)
            is_well = not answer["is_last"]
        finally:
            # Also when this task runs into its own limit of time: an answer that nobody reads would be
            # taken for the next one.
            self._give_back(process, is_well=is_well)
        return answer

    def _taken(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        process = _Process(self._limits)
        with self._lock:
            self._all.add(process)
        return process

    def _give_back(self, process: _Process, *, is_well: bool) -> None:
        with self._lock:
            if is_well and process in self._all:
                self._idle.append(process)
                return
            self._all.discard(process)
        process.end()

    def _forget(self) -> None:
        """In a forked child: the processes are its parent's, and end with that, not with this one."""
        for process in self._all:
            process.close()
        self._lock, self._all, self._idle = threading.Lock(), set(), []


def _text(answer: dict[str, Any]) -> ParsedText:
    return ParsedText(
        text=answer["text"],
        headings=tuple(Heading(**heading) for heading in answer["headings"]),
        page_starts=tuple(answer["page_starts"]),
        encoding=answer["encoding"],
        table_parts=tuple((start, end) for start, end in answer["table_parts"]),
        blocks=tuple(Block(one["start"], one["end"], Kind(one["kind"])) for one in answer["blocks"]),
    )
