"""The web application; ``uvicorn starlette_app.web:web`` serves it."""

from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from celery_alchemy import enqueue
from starlette_app.tasks import Order, alchemy, charge


# <middleware>
class SessionMiddleware:
    """Gives each request a session, in ``request.state.session``; what was not committed is rolled back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        async with alchemy.async_session() as session:
            scope.setdefault("state", {})["session"] = session
            await self.app(scope, receive, send)


# </middleware>


# <routes>
async def create_order(request: Request) -> JSONResponse:
    """Take an order and have it charged: both or neither."""
    session: AsyncSession = request.state.session
    order = Order(item=request.query_params["item"])
    session.add(order)
    await session.flush()
    enqueue(session, charge.s(order.id))
    await session.commit()
    return JSONResponse({"id": order.id}, status_code=202)


# </routes>


async def read_order(request: Request) -> JSONResponse:
    """Say what has become of an order."""
    session: AsyncSession = request.state.session
    order = await session.get(Order, request.path_params["order_id"])
    if order is None:
        return JSONResponse({"error": "there is no such order"}, status_code=404)
    return JSONResponse({"item": order.item, "state": order.state})


web = Starlette(
    routes=[Route("/orders", create_order, methods=["POST"]), Route("/orders/{order_id:int}", read_order)],
    middleware=[Middleware(SessionMiddleware)],
)
