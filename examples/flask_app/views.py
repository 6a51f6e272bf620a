"""The views, with Flask-SQLAlchemy's session."""

from flask import Blueprint, request

from celery_alchemy import enqueue
from flask_app.models import Order, db
from flask_app.tasks import charge

views = Blueprint("views", __name__)


# <views>
@views.post("/orders")
def create_order() -> tuple[dict[str, int], int]:
    """Take an order and have it charged: both or neither."""
    order = Order(item=request.args["item"])
    db.session.add(order)
    db.session.flush()
    enqueue(db.session, charge.s(order.id))
    db.session.commit()
    return {"id": order.id}, 202


# </views>


@views.get("/orders/<int:order_id>")
def read_order(order_id: int) -> dict[str, str]:
    """Say what has become of an order."""
    order = db.get_or_404(Order, order_id)
    return {"item": order.item, "state": order.state}
