"""The process in which documents are parsed; `ragline.confinement` starts it.

It reads documents from its standard input and writes texts, or reasons, to its standard output. It
ends itself: by a timer of the system's when a document takes too long, and as soon as whoever started
it is gone.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import struct
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from ragline.errors import DocumentError, TooLargeError
from ragline.limits import Limits
from ragline.parsers import parse

FRAME = struct.Struct(">LQ")
"""Before a document: the lengths of its name and of its bytes."""
LENGTH = struct.Struct(">Q")
"""Before an answer: its length."""
CLOCK_FACTOR = 10
"""A limit of the clock for a document that uses no processor: a machine that swaps."""
MAX_DOCUMENTS = 1_000
"""What libraries leak ends with the process."""

Request = tuple[str, bytes]


def main() -> None:
    """Parse documents until nobody sends any more."""
    limits = Limits(**json.loads(sys.argv[1]))
    # Whoever started it decides when it ends, with a pipe: Ctrl-C, and a service that stops, reach the
    # whole group.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    # A signal that is ignored, as it may have been inherited, would leave the timers without effect.
    for deadly in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(deadly, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(limits.memory_bytes)
    # What libraries print would be read as an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, requests), daemon=True).start()
    for number in range(1, MAX_DOCUMENTS + 1):
        name, data = requests.get()
        answer = _parsed(name, data, limits)
        answer["is_last"] = number == MAX_DOCUMENTS or _is_bloated(limits.memory_bytes)
        text = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
        answers.write(LENGTH.pack(len(text)) + text)
        answers.flush()


def _read(stream: BinaryIO, requests: queue.SimpleQueue[Request]) -> None:
    """Pass documents on; end the process, also in mid-document, when nobody is left to send some."""
    while len(frame := stream.read(FRAME.size)) == FRAME.size:
        name_bytes, data_bytes = FRAME.unpack(frame)
        name = stream.read(name_bytes).decode("utf-8", "surrogateescape")
        requests.put((name, stream.read(data_bytes)))
    os._exit(0)


def _parsed(name: str, data: bytes, limits: Limits) -> dict[str, object]:
    # The default action of both signals ends the process: no code, of whatever language, holds it up.
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds * CLOCK_FACTOR)
    try:
        return {"parsed": asdict(parse(data, name, limits))}
    except Exception as error:
        if _is_out_of_memory(error):
            return _too_much_memory(limits)
        if isinstance(error, DocumentError):
            return {"error": type(error).__name__, "reason": str(error)}
        # A fault of a parser's, told with its place.
        trace = traceback.format_exc(limit=-5)
        return {"error": "ParserError", "reason": f"{type(error).__name__}: {error}", "trace": trace}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a parser took the end of its memory for a fault of the document's."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _too_much_memory(limits: Limits) -> dict[str, object]:
    megabytes = limits.memory_bytes // 1_000_000
    reason = f"Reading it takes more memory than the limit of {megabytes:,} MB."
    return {"error": TooLargeError.__name__, "reason": reason}


def _limit_memory(memory_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > memory_bytes:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
        except (ValueError, OSError):  # macOS has no such limit: that of time holds there
            return


def _is_bloated(memory_bytes: int) -> bool:
    """Whether a document has left so little of the memory that the next one would suffer for it."""
    return _peak_bytes() > memory_bytes // 2


def _peak_bytes() -> int:
    """The most memory that this process has held at once.

    On Linux `ru_maxrss` begins with that of the process that started this one (getrusage(2) keeps it
    over execve), which holds a model and many documents; `VmHWM` begins anew.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


if __name__ == "__main__":
    main()
