"""E-mails to text: who wrote to whom, when, about what; the message, and what is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser

from ragline.errors import DocumentError, EmptyError
from ragline.limits import Limits
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_HEADERS = ("From", "To", "Cc", "Date")
_MAX_ATTACHMENTS = 100

Parse = Callable[[bytes, str], ParsedText]


def parse_message(data: bytes, limits: Limits, parse: Parse) -> ParsedText:
    """The text of an e-mail.

    Args:
        data: the message as it is sent.
        limits: characters are counted while they come.
        parse: makes text of the body, and of what is attached, by its file name.

    Raises:
        TooLargeError: it goes beyond a limit.
    """
    message = BytesParser(_class=EmailMessage, policy=policy.default).parsebytes(data)
    writer = TextWriter(limits)
    writer.block(_header(message, "Subject"), level=1)
    headers = ((name, _header(message, name)) for name in _HEADERS)
    writer.block("\n".join(f"{name}: {value}" for name, value in headers if value))
    body = message.get_body(preferencelist=("plain", "html"))
    if isinstance(body, EmailMessage):
        name = "body.html" if body.get_content_subtype() == "html" else "body.txt"
        _insert(_bytes(body), name, parse, writer)
    for part, _ in zip(message.iter_attachments(), range(_MAX_ATTACHMENTS), strict=False):
        if isinstance(part, EmailMessage):
            _attach(part, parse, writer)
    return writer.parsed()


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name, "")).split())
    except (ValueError, IndexError, AttributeError, TypeError):
        # The standard library stumbles over some headers that break the rules.
        return ""


def _attach(part: EmailMessage, parse: Parse, writer: TextWriter) -> None:
    """Write what is attached under its name; what holds no text is named alone."""
    is_message = part.get_content_maintype() == "message"
    name = part.get_filename() or ("message.eml" if is_message else "")
    if not name:
        return
    writer.block(name, level=2)
    try:
        _insert(_bytes(part), name, parse, writer, level=2)
    except DocumentError as error:
        writer.block(f"({error})")


def _insert(data: bytes, name: str, parse: Parse, writer: TextWriter, *, level: int = 1) -> None:
    try:
        writer.insert(parse(data, name), level=level)
    except EmptyError:
        return


def _bytes(part: EmailMessage) -> bytes:
    """The content, text as UTF-8 where its encoding is known."""
    if part.get_content_maintype() == "message":
        inner = part.get_payload(0) if part.is_multipart() else None
        return bytes(inner) if isinstance(inner, EmailMessage) else b""
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    if part.get_content_maintype() == "text":
        try:
            return data.decode(part.get_content_charset("utf-8")).encode()
        except (LookupError, UnicodeError):
            return data
    return data
