"""The Celery app, its Alchemy, and the tasks; ``celery -A fastapi_app.tasks worker`` runs them."""

from celery import Celery
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from fastapi_app.models import Base, Order
from without_servers import celery_settings, database_url

# <tasks>
celery = Celery("fastapi_app")
celery.conf.update(celery_settings("fastapi_app"))
alchemy = Alchemy(celery, database_url("fastapi_app"), outbox=True)


@celery.task(once=True)
def charge(session: Session, order_id: int) -> str:
    """Charge an order, however often the broker delivers this."""
    order = session.get_one(Order, order_id)
    order.state = "charged"
    return order.item


# </tasks>


def create_tables() -> None:
    """Make the tables of the shop and that of the outbox; an application of your own has Alembic for it."""
    Base.metadata.create_all(alchemy.engine)
    alchemy.create_tables()
