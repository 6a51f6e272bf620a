"""The table, and the engine that all variants share."""

from sqlalchemy import String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from without_servers import database_url


class Base(DeclarativeBase):
    """All tables."""


class Document(Base):
    """A text that is imported and then indexed."""

    __tablename__ = "documents"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20), default="new")


engine = create_engine(database_url("from_hand_written"), connect_args={"timeout": 30})
SessionLocal = sessionmaker(engine)


def slow_work(title: str) -> str:
    """Stand for an HTTP call, an embedding, a language model."""
    return title.upper()
