"""The table, the Celery app, its Alchemy and an async task; ``celery -A starlette_app.tasks worker`` runs it."""

from celery import Celery
from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from celery_alchemy import Alchemy
from without_servers import celery_settings, database_url


class Base(DeclarativeBase):
    """All tables of the shop."""


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20), default="new")


celery = Celery("starlette_app")
celery.conf.update(celery_settings("starlette_app"))
alchemy = Alchemy(celery, database_url("starlette_app"), outbox=True)


# <tasks>
@celery.task(once=True)
async def charge(session: AsyncSession, order_id: int) -> str:
    """Charge an order, however often the broker delivers this."""
    order = await session.get_one(Order, order_id)
    order.state = "charged"
    return order.item


# </tasks>


def create_tables() -> None:
    """Make the table of the shop and that of the outbox; an application of your own has Alembic for it."""
    Base.metadata.create_all(alchemy.engine)
    alchemy.create_tables()
