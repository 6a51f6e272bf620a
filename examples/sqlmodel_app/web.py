"""The web application; ``uvicorn sqlmodel_app.web:web`` serves it."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlmodel import Session

from celery_alchemy import enqueue
from sqlmodel_app.tasks import Order, SessionLocal, charge

web = FastAPI()


# <web>
def get_session() -> Iterator[Session]:
    """SQLModel's usual dependency, from the sessionmaker that Alchemy was given."""
    with SessionLocal() as session:
        yield session


@web.post("/orders", status_code=202)
def create_order(order: Order, session: Annotated[Session, Depends(get_session)]) -> Order:
    """Take an order and have it charged: both or neither."""
    session.add(order)
    session.flush()
    enqueue(session, charge.s(order.id))
    session.commit()
    return order


# </web>


@web.get("/orders/{order_id}")
def read_order(order_id: int, session: Annotated[Session, Depends(get_session)]) -> Order:
    """Say what has become of an order."""
    order = session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"There is no order {order_id}.")
    return order
