"""Why a document cannot be processed, in words for the person who added it."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class RaglineError(Exception):
    """Any error that ragline raises itself."""


class DocumentError(RaglineError):
    """This document can never be processed as it is: trying again changes nothing.

    The text of the exception is the reason that `ragline status` shows.
    """


class UnreadableError(DocumentError):
    """The bytes could not be read at all: no permission, gone, a broken disk."""


class EmptyError(DocumentError):
    """There is nothing in it: zero bytes, or only white space."""


class TooLargeError(DocumentError):
    """It is larger than the configured limit."""

    @classmethod
    def over(cls, max_bytes: int) -> TooLargeError:
        """Say what the limit is, in the page's words."""
        unit, size = ("kB", max_bytes / 1e3) if max_bytes < 1e6 else ("MB", max_bytes / 1e6)
        return cls(f"It is larger than the limit of {size:g} {unit}.")


class UnsupportedError(DocumentError):
    """It is binary data, or a format that no parser here reads."""


class EncryptedError(DocumentError):
    """It is protected by a password."""


class ScannedError(DocumentError):
    """It has pages but no text layer: pictures of text."""


class DamagedError(DocumentError):
    """It claims to be of a format but cannot be read as one."""


class TooSlowError(DocumentError):
    """Parsing it takes longer than the limit."""

    @classmethod
    def over(cls, seconds: int) -> TooSlowError:
        """Say what the limit is."""
        return cls(f"Reading it takes longer than the limit of {seconds} seconds.")


class CrashedError(DocumentError):
    """It crashes the library that parses it."""


class ParserError(RaglineError):
    """A parser has failed in a way that nobody foresaw; another version of it may not."""


class ModelUnavailableError(RaglineError):
    """The embedding model cannot be had here; search works by keywords alone."""


class DatabaseError(RaglineError):
    """The database does not do what it is asked for."""


class ConfigurationError(RaglineError):
    """A setting has a value that ragline cannot use."""


class NoSuchDocumentError(RaglineError):
    """No document has this id, path or name; it may have been deleted meanwhile."""

    def __init__(self, reference: int | str) -> None:
        super().__init__(reference)
        self.reference = reference

    def __str__(self) -> str:
        """Say what to do."""
        return f"There is no document {self.reference}: `ragline list` shows all."


class AmbiguousNameError(RaglineError):
    """A name is that of several places; each is told with what to call it by.

    Attributes:
        reference: the name.
        documents: the id of the document and the label of each.
    """

    def __init__(self, reference: str, documents: Sequence[tuple[int, str]]) -> None:
        super().__init__(reference, tuple(documents))
        self.reference = reference
        self.documents = tuple(documents)

    def __str__(self) -> str:
        """Say which there are."""
        told = ", ".join(f"{label} ({document_id})" for document_id, label in self.documents[:10])
        more = len(self.documents) - 10
        rest = f" and {more} more" if more > 0 else ""
        are_apart = len(dict(self.documents)) == len(self.documents)
        return (
            f"{len(self.documents)} {'documents' if are_apart else 'places'} are called {self.reference}:"
            f" {told}{rest}. Name one as it stands here, by its path, or by its id."
        )


class MissingFileError(RaglineError):
    """Files or folders that a person named are not there."""

    def __init__(self, paths: Sequence[str], *, is_known: bool = False) -> None:
        super().__init__(tuple(paths), is_known)
        self.paths, self.is_known = tuple(paths), is_known

    def __str__(self) -> str:
        """Say which, and what to do about those that the index has."""
        are = "is" if len(self.paths) == 1 else "are"
        hint = " To forget what it held, say `ragline ingest --prune`." if self.is_known else ""
        return f"{', '.join(self.paths)} {are} not there: nothing was taken in.{hint}"


class NobodyWorksError(RaglineError):
    """Documents wait, and nobody is there to work on them.

    Attributes:
        unserved: the queues that no worker takes from; None where the broker does not answer.
        is_any_served: whether there is a worker, which takes from other queues.
        broker: which broker it is, without its password.
    """

    def __init__(
        self, unserved: Collection[str] | None, *, is_any_served: bool = False, broker: str = ""
    ) -> None:
        super().__init__(unserved, is_any_served, broker)
        self.unserved, self.is_any_served, self.broker = unserved, is_any_served, broker

    def __str__(self) -> str:
        """Say what is missing."""
        if self.unserved is None:
            return f"The broker {self.broker} does not answer: the documents are worked on when it is back."
        if not self.is_any_served:
            return "No worker is running: start one with `ragline worker`."
        queues = ", ".join(sorted(self.unserved))
        return f"No worker takes from {queues}: start one with `ragline worker`."


class NotPossibleError(RaglineError):
    """The document is in a state in which this cannot be done; the text says in which."""


class EndpointError(RaglineError):
    """A model's server refuses, or its answer cannot be used: somebody has to look at the settings."""


class EndpointBusyError(EndpointError):
    """A model's server gives no answer now; the same call may succeed later.

    Attributes:
        retry_after_seconds: how long it asks to be left alone, or None where it does not say.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])
