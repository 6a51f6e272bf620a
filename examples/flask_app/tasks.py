"""The tasks. They know neither the web application nor the Celery app, so that a factory can make both."""

from celery import shared_task
from flask import current_app
from sqlalchemy.orm import Session

from flask_app.models import Order, db


# <tasks>
@shared_task(once=True)  # type: ignore[call-overload] # celery-types knows no options of ours.
def charge(session: Session, order_id: int) -> str:
    """Charge an order, however often the broker delivers this."""
    order = session.get_one(Order, order_id)
    order.state = "charged"
    return order.item


@shared_task
def invoice(order_id: int) -> str:
    """Write an invoice; its sender is in Flask's configuration, and the session is db.session."""
    order = db.session.get_one(Order, order_id)
    order.state = "invoiced"
    return f"{current_app.name}: {order.item}"


# </tasks>
