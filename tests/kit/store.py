"""A store whose tasks send, fail, retry and take effect once: what the testing kit is tried on."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy.alchemy import Bind
from tests.services.databases import Database
from tests.stand import Stand


class Base(DeclarativeBase):
    """The tables of the store."""


class Payment(Base):
    """A payment; nothing keeps an order from being paid twice."""

    __tablename__ = "kit_payment"

    id: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[str] = mapped_column(String(100))


class Store(Stand):
    """A stand with a table of payments, and tasks.

    Args:
        database: The test's database.
        bind: What Alchemy is given; left out, the test's database.
        outbox: Messages go through the outbox.
        broker: The database is the broker.
        settings: Of the Celery app.
    """

    def __init__(
        self, database: Database, bind: Bind | None = None, *, outbox: bool = True, broker: bool = False, **settings: Any
    ) -> None:
        if not broker:
            settings["broker_transport_options"] = {"polling_interval": 0.01}
        bind = database.url if bind is None else bind
        super().__init__(database, broker, settings=settings, bind=bind, outbox=outbox)
        Base.metadata.create_all(database.engine)
        self.alchemy.create_tables()
        task: Any = self.app.task

        @task(shared=False, name="store.pay")
        def pay(session: Session, order: str) -> int:
            payment = Payment(order=order)
            session.add(payment)
            session.flush()
            receipt.delay_on_commit(order=order)
            return payment.id

        @task(shared=False, name="store.pay_once", once=True)
        def pay_once(session: Session, order: str) -> str:
            session.add(Payment(order=order))
            receipt.delay_on_commit(order)
            return order

        @task(shared=False, name="store.pay_async")
        async def pay_async(session: AsyncSession, order: str) -> None:
            session.add(Payment(order=order))
            receipt.apply_async_on_commit((order,), session=session)

        @task(shared=False, name="store.receipt")
        def receipt(order: str, copies: int = 1) -> str:
            return f"{copies} of {order}"

        @task(shared=False, name="store.fail")
        def fail(session: Session) -> None:
            session.add(Payment(order="half done"))
            session.flush()
            receipt.delay_on_commit("never")
            raise LookupError("the reason")

        @task(shared=False, name="store.retry", bind=True, max_retries=2)
        def retry(self: Any, session: Session) -> int:
            session.add(Payment(order=f"attempt {self.request.retries}"))
            if self.request.retries < 2:
                raise self.retry(countdown=60)
            return int(self.request.retries)

        self.pay, self.pay_once, self.pay_async, self.receipt = pay, pay_once, pay_async, receipt
        self.fail, self.retry = fail, retry

    @property
    def paid(self) -> list[str]:
        """What is paid, as a session of the Alchemy sees it."""
        with self.alchemy.session() as session:
            return list(session.scalars(select(Payment.order).order_by(Payment.id)))

    def committed(self) -> int:
        """How many payments there are for good."""
        with self.alchemy.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(Payment)) or 0
