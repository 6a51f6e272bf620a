"""The table, the Celery app, its Alchemy and the task; ``celery -A sqlmodel_app.tasks worker`` runs it."""

from celery import Celery
from sqlalchemy.orm import sessionmaker
from sqlmodel import Field, Session, SQLModel, create_engine, select

from celery_alchemy import Alchemy
from without_servers import celery_settings, database_url


# <tasks>
class Order(SQLModel, table=True):
    """What a customer wants."""

    id: int | None = Field(default=None, primary_key=True)
    item: str
    state: str = "new"


engine = create_engine(database_url("sqlmodel_app"))
SessionLocal = sessionmaker(engine, class_=Session, expire_on_commit=False)

celery = Celery("sqlmodel_app")
celery.conf.update(celery_settings("sqlmodel_app"))
alchemy = Alchemy(celery, SessionLocal, outbox=True)


@celery.task(once=True)
def charge(session: Session, order_id: int) -> str:
    """Charge an order, however often the broker delivers this."""
    order = session.exec(select(Order).where(Order.id == order_id)).one()
    order.state = "charged"
    session.add(order)
    return str(order.item)


# </tasks>


def create_tables() -> None:
    """Make the table of the shop and that of the outbox; an application of your own has Alembic for it."""
    SQLModel.metadata.create_all(engine)
    alchemy.create_tables()
