"""Who may talk to a web page on this machine: requests under the names it is served by, sent by pages of its own.

A browser carries the requests of any page to this machine. A foreign page may post here, and then names itself in
``Origin``; a foreign name may be made to point here (DNS rebinding), and then stands in ``Host``. Both are refused before
an endpoint sees them, HTTP and WebSocket alike, and so are bodies larger than anything the page sends. starlette's
TrustedHostMiddleware looks at ``Host`` alone and knows neither ports nor address ranges.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from ipaddress import ip_address
from typing import Any

from vargen.validation.checks import shown

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Authority = tuple[str, int | None]  # name or address, port where one is given

MAX_BODY = 2**20  # bytes of one request; the settings of a drawing take some hundreds
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_PORTS = {"http": 80, "https": 443}
_ANY = ("0.0.0.0", "::")  # listening on every address of the machine


class SameSite:
    """ASGI middleware that passes on what belongs to the page and refuses the rest with one line.

    A request belongs to the page if ``Host`` is a loopback name (localhost, 127.0.0.0/8, ::1; any port, so that tunnels
    work), the host and port that the page was started with, or one of ``allowed``, and ``Origin``, where there is one, names
    the same host and port or one of ``allowed``. A page that listens on every address is also served under any address: those
    cannot be rebound.

    Args:
        app: what is protected.
        host: name or address that the page was started with.
        port: its port.
        allowed: further names or addresses, without port.

    Raises:
        ValueError: an allowed name that is none.
    """

    def __init__(self, app: Any, host: str, port: int, allowed: Iterable[str] = ()) -> None:
        self.app, self.own, self.any_address = app, (_plain(host), port), host in _ANY
        self.allowed = frozenset(check_names(allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refused = self.refusal(scope["headers"]) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1][:120]})
        else:
            body = refused[1].encode() + b"\n"
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": refused[0], "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Say why a request is refused: status and one line; None where it is not."""
        found: dict[str, list[str]] = {}
        for name, value in headers:
            found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts, origins = found.get("host", []), found.get("origin", [])
        host = read_authority(hosts[0]) if len(hosts) == 1 else None
        if host is None or not self._is_ours(host):
            return 403, "refused: the page is not served under this name; --allow-host NAME allows another one"
        if len(origins) > 1 or (origins and not self._is_same(origins[0], host)):
            return 403, "refused: the request comes from another site"
        length = found.get("content-length", ["0"])[0]
        if "transfer-encoding" in found or not length.isdecimal() or len(length) > 9 or int(length) > MAX_BODY:
            return 413, f"refused: a request may hold {MAX_BODY} bytes and must say how many"
        return None

    def _is_ours(self, host: Authority) -> bool:
        name, port = host
        address = _address(name)
        if name == "localhost" or (address is not None and (address.is_loopback or self.any_address)):
            return True
        return name in self.allowed or (name, port or _PORTS["http"]) == self.own

    def _is_same(self, origin: str, host: Authority) -> bool:
        scheme, _, rest = origin.partition("://")
        sender = read_authority(rest) if scheme in _PORTS else None
        if sender is None:
            return False
        default = _PORTS[scheme]
        return sender[0] in self.allowed or (sender[0], sender[1] or default) == (host[0], host[1] or default)


def read_authority(text: str) -> Authority | None:
    """Read ``name:port``, ``name``, ``[::1]:port``; None where it is neither."""
    match = _AUTHORITY.fullmatch(text.strip().lower())
    return (_plain(match[1]), None if match[2] is None else int(match[2])) if match else None


def check_names(names: Iterable[str]) -> list[str]:
    """Return names of hosts as they are compared.

    Raises:
        ValueError: something else than a name or an address, such as a URL.
    """
    for name in names:
        bracketed = f"[{name}]" if ":" in name else name
        found = read_authority(bracketed)
        if found is None or found[1] is not None or (":" in name and _address(name) is None):
            raise ValueError(f"an allowed host is a name or an address without scheme and port, got {shown(name)}")
    return [_plain(name) for name in names]


def _plain(name: str) -> str:
    address = _address(name)
    return name.lower() if address is None else str(address)


def _address(name: str) -> Any:
    try:
        return ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
