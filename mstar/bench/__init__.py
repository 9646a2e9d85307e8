"""Load for any OpenAI-compatible or native server, and what its clients felt. Needs no torch.

A run goes through the files in this order: `prompts` says what is sent, `routes` how, `load` when,
`connection` when each byte arrived; `trace` holds what one request saw, `measure` makes figures of
it, `report` makes the table and the JSON. `run` puts them together; `mstar bench` is its shell.
"""

from __future__ import annotations

__all__ = ["need_httpcore"]


def need_httpcore() -> None:
    """Refuse to go on where the HTTP library is missing.

    Raises:
        ImportError: says how to install it.
    """
    try:
        import anyio  # noqa: F401
        import httpcore  # noqa: F401
    except ImportError as error:
        how = "pip install 'mstar[async]'"
        raise ImportError(f"mstar bench needs httpx: {how}", name="httpx") from error
