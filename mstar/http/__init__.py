"""The HTTP layer: a thin skin over one Engine. Needs `pip install mstar[server]`.

    from mstar import Engine
    from mstar.http import create_app

    app = create_app(Engine("orpheus-tiny"))

Nothing else in mstar imports this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mstar.http.app import create_app as create_app
    from mstar.http.server import serve as serve

_HOME = {"create_app": "mstar.http.app", "serve": "mstar.http.server"}
_EXTRA = (
    *("fastapi", "starlette", "uvicorn", "httptools", "python_multipart", "prometheus_client"),
    *("msgpack", "websockets"),
)

__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mstar.http' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        hint = "the HTTP layer needs more packages: pip install 'mstar[server]'"
        raise ModuleNotFoundError(f"no module {error.name!r}; {hint}", name=error.name) from None
