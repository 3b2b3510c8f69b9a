"""What stands between a browser and the dashboard, which has no password of its own.

A page of another site can send requests to this machine, and with a name that it rebinds to this
machine's address even read the answers. Such requests carry the other site's name in `Host` or
`Origin`. And artifacts are files that a study brings along, which no browser may run as a page.
"""

import ipaddress
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERY_ADDRESS = ("", "0.0.0.0", "::")

_AS_FILE = (("Content-Disposition", "attachment"), ("X-Content-Type-Options", "nosniff"))
_REPLACED = ("content-disposition", "x-content-type-options", "access-control-allow-origin")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
"""A WSGI application."""


@dataclass(frozen=True)
class Guarded:
    """An application that answers requests to this machine's own names only.

    Attributes:
        app: the application.
        host: what the server listens on; its name is answered to.
    """

    app: Application
    host: str

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer, or refuse with 403 and one line."""
        origin = environ.get("HTTP_ORIGIN")
        asked = [environ.get("HTTP_HOST", "")]
        asked += [] if origin is None else [origin.partition("://")[2]]
        strange = [name for name in asked if not is_own(name, self.host)]
        if strange:
            head = [("Content-Type", "text/plain; charset=utf-8"), _AS_FILE[1]]
            start_response("403 Forbidden", head)
            return [b"this dashboard answers to localhost and to the name given by --host only\n"]
        if not environ.get("PATH_INFO", "").startswith("/artifacts/"):
            return self.app(environ, start_response)

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            kept = [(k, v) for k, v in headers if k.lower() not in _REPLACED]
            return start_response(status, [*kept, *_AS_FILE], *rest)

        return self.app(environ, start)


def is_own(named: str, host: str) -> bool:
    """Whether a name that a request is for is one of this server.

    Worked example: listening on 127.0.0.1, `localhost:8080` and `[::1]:80` are, `evil.example` is
    not. Listening on every address, all addresses in numbers are, and this machine's names.

    Args:
        named: name or address, perhaps with a port, as in `Host`.
        host: what the server listens on.
    """
    name = _without_port(named)
    if name in (*_LOOPBACK, host.lower()) and name:
        return True
    if host not in _EVERY_ADDRESS:
        return False
    return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())


def _without_port(named: str) -> str:
    """`localhost` of `LocalHost.:80`, `::1` of `[::1]:80`."""
    lowered = named.strip().lower()
    if lowered.startswith("["):
        return lowered[1:].partition("]")[0]
    return lowered.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
