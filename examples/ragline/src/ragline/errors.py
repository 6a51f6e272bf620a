"""Why a document cannot be processed, in words for the person who added it."""

from __future__ import annotations


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
