"""What an app is told so that its broker, and result backend, is the database of its Alchemy.

Between ``Alchemy``, which is made before or after the app's configuration is read, and the settings
of Celery.
"""

from __future__ import annotations

from kombu.utils.url import maybe_sanitize_url

from ..errors import ConfigurationError
from ..messages.celery_types import App
from . import SCHEME
from .homes import HOME_OPTION

__all__ = ["be_broker_of", "refuse_other_broker"]

_URL = f"{SCHEME}://"


def be_broker_of(app: App, key: str) -> None:
    """Have an app's connections mean a database of this process.

    Args:
        app: The app; its configuration may be read again later.
        key: What names the database in the transport options.

    Raises:
        ConfigurationError: The app has another broker.
    """
    refuse_other_broker(app)
    _tell(app, key)

    def tell_again(**kwargs: object) -> None:
        # What was read before is forgotten. An error would only be logged here: a worker's start
        # refuses another broker.
        if _other_broker(app) is None:
            _tell(app, key)

    app.on_after_configure.connect(tell_again, weak=False)


def _tell(app: App, key: str) -> None:
    conf = app.conf
    conf["broker_url"] = _URL
    options = conf.broker_transport_options or {}
    conf.broker_transport_options = {**options, HOME_OPTION: key}
    if not conf.result_backend:
        conf["result_backend"] = _URL


def refuse_other_broker(app: App) -> None:
    """Refuse an app that was given another broker.

    Raises:
        ConfigurationError: It says which.
    """
    other = _other_broker(app)
    if other is not None:
        setting, url = other
        raise ConfigurationError(
            f"The app {app.main!r} has {setting}={maybe_sanitize_url(url)!r}, its Alchemy"
            " broker=True.",
            f"Remove {setting}, which may come from an environment variable too, or broker=True.",
        )


def _other_broker(app: App) -> tuple[str, str] | None:
    for setting in ("broker_url", "broker_read_url", "broker_write_url"):
        given: object = getattr(app.conf, setting)
        for url in given if isinstance(given, (list, tuple)) else [given]:
            if url and str(url).rstrip("/") != _URL.rstrip("/"):
                return setting, str(url)
    return None
