"""The settings of ragline, read from the environment once, at the start of a process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ragline.endpoints import Endpoint
from ragline.errors import ConfigurationError
from ragline.limits import DEFAULT_LIMITS, Limits

QUEUES = ("parsing", "embedding")
EMBEDDERS = ("auto", "minilm", "openai", "none")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where ragline keeps its things and how it works.

    Attributes:
        home: folder of the embedded database (`RAGLINE_HOME`).
        cache: folder of the fetched model, shared by all homes (`RAGLINE_CACHE`).
        database_url: URL of SQLite, PostgreSQL, MariaDB or MySQL (`RAGLINE_DATABASE_URL`); a file in the home
            by default.
        broker_url: Celery broker URL (`RAGLINE_BROKER_URL`); None, as by default, where the database is the
            broker.
        queues: what the names of queues begin with (`RAGLINE_QUEUES`): installations can share a broker.
        embedder: "minilm", "openai" for an endpoint, "none" for keyword search only, or "auto": the endpoint
            if one is set, else MiniLM where it can be had (`RAGLINE_EMBEDDER`).
        embeddings: an OpenAI-compatible endpoint that embeds, or None (`RAGLINE_EMBEDDINGS_URL`, `..._MODEL`,
            `..._KEY`, `..._DIMENSIONS`, `..._SECONDS`).
        chat: one that answers questions, or None (`RAGLINE_CHAT_URL`, `..._MODEL`, `..._KEY`,
            `..._SECONDS`).
        max_bytes: a larger document is refused (`RAGLINE_MAX_BYTES`).
        limits: what parsing one document may cost: seconds of processor time
            (`RAGLINE_PARSE_SECONDS`), memory (`RAGLINE_PARSE_MEGABYTES`), pages, elements and characters
            (`RAGLINE_MAX_PAGES`, `..._ELEMENTS`, `..._CHARACTERS`).
        batch_chunks: how many chunks one task embeds, a second or two of work (`RAGLINE_BATCH_CHUNKS`).
        redeliver_seconds: after how long a step that was lost with another broker, or its workers, is sent
            again (`RAGLINE_REDELIVER_SECONDS`).
        worker_lost_seconds: where the database is the broker: how long a worker may be silent until others do
            what it was doing (`RAGLINE_WORKER_LOST_SECONDS`).
        token: what the web page asks for, or None (`RAGLINE_TOKEN`).
    """

    home: Path
    cache: Path
    database_url: str
    broker_url: str | None
    queues: str
    embedder: str
    embeddings: Endpoint | None
    chat: Endpoint | None
    max_bytes: int
    limits: Limits
    batch_chunks: int
    redeliver_seconds: int
    worker_lost_seconds: int
    token: str | None = field(repr=False)

    @property
    def queue_names(self) -> dict[str, str]:
        """The names of the queues at the broker: for parsing, which needs a CPU, and for embedding."""
        return {kind: f"{self.queues}-{kind}" for kind in QUEUES}

    @property
    def database_is_broker(self) -> bool:
        """Whether messages wait in the database, and no other server is needed for them."""
        return self.broker_url is None

    @property
    def broker_name(self) -> str:
        """Which broker it is, for people: without its password."""
        if self.broker_url is None:
            return "the database"
        from kombu.utils.url import sanitize_url

        return ", ".join(sanitize_url(url, mask="***") for url in self.broker_url.split(";"))


MIN_TOKEN_CHARACTERS = 16


def settings_from(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    Raises:
        ConfigurationError: a value that cannot be used, with the name of its variable.
    """
    home = _folder(environment, "RAGLINE_HOME", "XDG_DATA_HOME", ".local/share")
    embedder = environment.get("RAGLINE_EMBEDDER") or "auto"
    if embedder not in EMBEDDERS:
        raise ConfigurationError(f"RAGLINE_EMBEDDER={embedder!r}: use one of {', '.join(EMBEDDERS)}.")
    embeddings = _endpoint(environment, "RAGLINE_EMBEDDINGS")
    if embedder == "openai" and embeddings is None:
        raise ConfigurationError("RAGLINE_EMBEDDER=openai needs RAGLINE_EMBEDDINGS_URL and ..._MODEL.")
    return Settings(
        home=home,
        cache=_folder(environment, "RAGLINE_CACHE", "XDG_CACHE_HOME", ".cache"),
        database_url=_database_url(
            environment.get("RAGLINE_DATABASE_URL") or f"sqlite:///{home / 'ragline.db'}"
        ),
        broker_url=_broker_url(environment.get("RAGLINE_BROKER_URL")),
        queues=_queues(environment),
        embedder=embedder,
        embeddings=embeddings,
        chat=_endpoint(environment, "RAGLINE_CHAT"),
        max_bytes=_positive(environment, "RAGLINE_MAX_BYTES", 50_000_000),
        limits=_limits(environment),
        batch_chunks=_positive(environment, "RAGLINE_BATCH_CHUNKS", 32),
        redeliver_seconds=_positive(environment, "RAGLINE_REDELIVER_SECONDS", 900),
        worker_lost_seconds=_positive(environment, "RAGLINE_WORKER_LOST_SECONDS", 30),
        token=_token(environment),
    )


# The dialect and driver of a URL that names no driver; each is an extra of ragline's.
_DRIVERS = {
    "sqlite": ("sqlite", "pysqlite"),
    "postgresql": ("postgresql", "psycopg"),
    "postgres": ("postgresql", "psycopg"),
    "mysql": ("mysql", "pymysql"),
    # SQLAlchemy knows the options of tables by the name `mysql` in both.
    "mariadb": ("mysql", "pymysql"),
}


def _database_url(text: str) -> str:
    """The URL with its driver."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # the second for a port that is no number
        raise ConfigurationError("RAGLINE_DATABASE_URL: write it as postgresql://user@host/name.") from None
    name, _, driver = url.drivername.partition("+")
    if name not in _DRIVERS:
        raise ConfigurationError(f"RAGLINE_DATABASE_URL: {name} is none of {', '.join(_DRIVERS)}.")
    dialect, usual = _DRIVERS[name]
    if not driver and dialect != "sqlite" and find_spec(usual) is None:
        raise ConfigurationError(
            f"RAGLINE_DATABASE_URL: {usual} is not installed: pip install 'ragline[{dialect}]'."
        )
    return url.set(drivername=f"{dialect}+{driver or usual}").render_as_string(hide_password=False)


def _limits(environment: Mapping[str, str]) -> Limits:
    megabytes = DEFAULT_LIMITS.memory_bytes // 1_000_000
    return Limits(
        seconds=_positive(environment, "RAGLINE_PARSE_SECONDS", DEFAULT_LIMITS.seconds),
        memory_bytes=_positive(environment, "RAGLINE_PARSE_MEGABYTES", megabytes) * 1_000_000,
        pages=_positive(environment, "RAGLINE_MAX_PAGES", DEFAULT_LIMITS.pages),
        elements=_positive(environment, "RAGLINE_MAX_ELEMENTS", DEFAULT_LIMITS.elements),
        characters=_positive(environment, "RAGLINE_MAX_CHARACTERS", DEFAULT_LIMITS.characters),
    )


def _broker_url(text: str | None) -> str | None:
    """The URL, or several apart by semicolons; what Celery cannot connect with ends in tracebacks later."""
    if not text:
        return None
    from kombu.transport import TRANSPORT_ALIASES

    for url in text.split(";"):
        scheme = url.partition("://")[0].partition("+")[0]
        if scheme not in TRANSPORT_ALIASES or not _has_good_port(url):
            raise ConfigurationError(
                "RAGLINE_BROKER_URL: write it as amqp://user@host:5672// or redis://host:6379/0."
            )
        if scheme in ("redis", "rediss", "sentinel") and find_spec("redis") is None:
            raise ConfigurationError(
                "RAGLINE_BROKER_URL: redis is not installed: pip install 'ragline[redis]'."
            )
    return text


def _has_good_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _queues(environment: Mapping[str, str]) -> str:
    name = environment.get("RAGLINE_QUEUES") or "ragline"
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
        raise ConfigurationError(f"RAGLINE_QUEUES={name!r}: use letters, digits, dots, hyphens, underscores.")
    return name


def _folder(environment: Mapping[str, str], own: str, shared: str, default: str) -> Path:
    if environment.get(own):
        return Path(environment[own]).expanduser().absolute()
    base = Path(environment[shared]) if environment.get(shared) else Path.home() / default
    return base / "ragline"


def _token(environment: Mapping[str, str]) -> str | None:
    token = environment.get("RAGLINE_TOKEN") or None
    if token is not None and len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigurationError(
            f"RAGLINE_TOKEN: give at least {MIN_TOKEN_CHARACTERS} characters, at random."
        )
    return token


def _endpoint(environment: Mapping[str, str], prefix: str) -> Endpoint | None:
    url, model = environment.get(f"{prefix}_URL"), environment.get(f"{prefix}_MODEL")
    if not url and not model:
        return None
    if not url or not model:
        raise ConfigurationError(f"{prefix}_URL and {prefix}_MODEL belong together: one of them is not set.")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_good_port(url):
        raise ConfigurationError(f"{prefix}_URL: give an address such as https://api.openai.com/v1.")
    return Endpoint(
        url,
        model,
        key=environment.get(f"{prefix}_KEY") or None,
        dimensions=_positive(environment, f"{prefix}_DIMENSIONS", 0) or None,
        timeout_seconds=_positive(environment, f"{prefix}_SECONDS", 60),
    )


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name)
    if not value:
        return default
    if not value.isdecimal() or int(value) < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number above 0.")
    return int(value)
