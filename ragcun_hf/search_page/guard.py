"""Refuse uploads, large requests, foreign hosts and foreign origins before Gradio sees them.

The page has no field for files, but Gradio would store any that are sent. A name in `Host` that is not this machine's
is how a web site reads a page of a private network (DNS rebinding), and another `Origin` is a form of such a site.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

_LARGEST_REQUEST = 2**18  # bytes; a query has at most 20,000 characters

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class PageGuard:
    """ASGI middleware. `hosts` are the names of this machine, beside IP addresses; None allows any name."""

    def __init__(self, app: Any, *, hosts: Collection[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass a request on, or refuse it."""
        refused = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refused
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _refusal(self, scope: _Scope) -> tuple[int, str] | None:
        """Return status and reason, or None for a request that is passed on."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_name(f"//{headers.get('host', '')}")
        if not self._is_own(host):
            return 403, "The search page answers under the names of its own machine and --allowed_hosts only."
        origin = _host_name(headers["origin"]) if "origin" in headers else host
        if origin != host and not (self._hosts is not None and origin in self._hosts):
            return 403, "The search page answers its own forms only."
        if "/upload" in scope["path"]:
            return 403, "The search page takes no files."
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()) or len(length) > 9 or int(length) > _LARGEST_REQUEST:
                return 413, f"The search page takes requests of up to {_LARGEST_REQUEST} bytes."
        return None

    def _is_own(self, host: str) -> bool:
        if self._hosts is None or host in self._hosts:
            return True
        try:  # no web site can have the browser call this machine's address by its own name
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def _host_name(address: str) -> str:
    try:
        return (urlsplit(address).hostname or "").rstrip(".")
    except ValueError:
        return ""
