"""Keeps web pages of other sites away from the server.

The browser of whoever sits at this machine reaches its loopback addresses. A page may have it send requests across
sites, or may give its own name the address 127.0.0.1 once it is open (DNS rebinding) and then counts as of this site.
Browsers say which page asks (`Origin`), and by which name they came (`Host`); no page can change either.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers

from vishwamai_mp.serving.limits import Refusal

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(:\d+)?")
# Of POST requests that a browser sends to another site without asking it first, these two are what `curl -d` and plain
# programs send as well. They are taken of what is not a browser: browsers send `Sec-Fetch-Site` to loopback.
_OF_PROGRAMS = ("", "application/x-www-form-urlencoded")


def check_sender(method: str, headers: Headers, address: str, names: Collection[str]) -> None:
    """Check that no page of another site sends this request.

    Args:
        method: of the request.
        headers: of the request.
        address: of this server, at which the request came in.
        names: of this server, beside those that mean this machine.

    Raises:
        Refusal: one does, or may.
    """
    host, origin = headers.get("host"), headers.get("origin")
    if host is not None and _is_loopback(address):
        name = _host_name(host)
        if name is None or not (name == "localhost" or name in names or _is_loopback(name)):
            raise Refusal(
                f"Host {host!r} is no name of this server: use localhost, or start it with --allow-host NAME",
                status=403,
            )
    if origin is not None:
        of_origin = origin.lower().partition("://")[2]
        if not of_origin or (of_origin != (host or "").lower() and _host_name(of_origin) not in names):
            raise Refusal(
                f"Origin {origin!r}: pages of other sites may not use this server; where its own page has that address,"
                " start it with --allow-host NAME",
                status=403,
            )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json" and ("sec-fetch-site" in headers or kind not in _OF_PROGRAMS):
        raise Refusal(f"content-type {kind!r}: send application/json", status=415)


def _is_loopback(text: str) -> bool:
    """Whether it is an address of this machine alone; 0.0.0.0 in a link means this machine too."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _host_name(host: str) -> str | None:
    """The name or address in `host`, which may end with a port; None where it is no such thing."""
    found = _HOST.fullmatch(host.lower())
    return found and found[1].strip("[]")
