"""The web application; ``uvicorn fastapi_app.web:web`` serves it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from fastapi_app.models import Order
from fastapi_app.tasks import alchemy, charge, create_tables


@asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncIterator[None]:
    """Have the tables before the first request."""
    create_tables()
    yield


web = FastAPI(lifespan=lifespan)


# <sync>
def get_session() -> Iterator[Session]:
    """A session for each request; what was not committed is rolled back."""
    with alchemy.session() as session:
        yield session


@web.post("/orders", status_code=202)
def create_order(item: str, session: Annotated[Session, Depends(get_session)]) -> dict[str, int]:
    """Take an order and have it charged: both or neither."""
    order = Order(item=item)
    session.add(order)
    session.flush()
    enqueue(session, charge.s(order.id))
    session.commit()
    return {"id": order.id}


# </sync>


# <async>
async def get_async_session() -> AsyncIterator[AsyncSession]:
    """The same for ``async def`` endpoints."""
    async with alchemy.async_session() as session:
        yield session


@web.post("/async-orders", status_code=202)
async def create_async_order(item: str, session: Annotated[AsyncSession, Depends(get_async_session)]) -> dict[str, int]:
    """Take an order and have it charged: both or neither."""
    order = Order(item=item)
    session.add(order)
    await session.flush()
    enqueue(session, charge.s(order.id))
    await session.commit()
    return {"id": order.id}


# </async>


@web.get("/orders/{order_id}")
def read_order(order_id: int, session: Annotated[Session, Depends(get_session)]) -> dict[str, str]:
    """Say what has become of an order."""
    order = session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, f"There is no order {order_id}.")
    return {"item": order.item, "state": order.state}
