"""Which names requests may be sent to, and which pages they may come from. A browser on the operator's own machine reaches a
service on loopback, whatever page it shows, so that the address alone keeps no page out:

- DNS rebinding: a page's own name is made to point at 127.0.0.1, and its scripts read answers as if they were the page's own.
  The browser still sends that name as Host, so that names other than the service's are refused. An address needs no name.
- A POST that needs no preflight (a form, or fetch with text/plain) is sent by any page, although it cannot read the answer. The
  browser names the page's origin, so that a POST from another origin than the service's own pages is refused.

Programs that are no browsers may send any header. They are kept out by the address, a firewall, or a proxy that asks for a token.
"""

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from gearnn_ray.core.errors import UserError

__all__ = ["Hosts", "StrangerError"]


class StrangerError(UserError):
    """A request that was sent to another host, or by a page of another one. `status` is the HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Hosts:
    """The address that the service listens on, and the names that its operator allows beside it."""

    bound: str = "127.0.0.1"
    named: tuple[str, ...] = ()

    def check(self, request: Request) -> None:
        """Raise StrangerError for a request to another host, and for a POST from a page of another one."""
        hosts = request.headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        if not self._allows(_name(host)):
            raise StrangerError(
                421,
                f"The host of the request is {host[:100]!r}, expected {self.bound}, localhost or a name in --allowed-hosts: "
                "use one of these, or allow this name.",
            )
        if request.method == "POST" and (origin := request.headers.get("origin")) is not None:
            _, _, authority = origin.partition("://")
            if authority.lower() != host.lower() and _name(authority) not in self.named:
                raise StrangerError(
                    403, f"The request comes from a page of {origin[:100]!r}: use the service's own page, or a program."
                )

    def _allows(self, name: str) -> bool:
        if name in ("localhost", self.bound.lower(), *self.named):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not _is_loopback(self.bound)


def _name(authority: str) -> str:
    """The host in "host:port", in lower case; "" where there is none."""
    try:
        return "" if "@" in authority else (urlsplit(f"//{authority}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
