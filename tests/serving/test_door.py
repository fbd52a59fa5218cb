"""Which requests a page of another site could have sent, without a server."""

import pytest

pytest.importorskip("starlette")

from starlette.datastructures import Headers

from vishwamai_mp.serving.door import check_sender
from vishwamai_mp.serving.limits import Refusal

_FORM = "application/x-www-form-urlencoded"


def check(address: str = "127.0.0.1", method: str = "POST", kind: str = "application/json", **headers: str) -> None:
    given = {"content-type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    check_sender(method, Headers(given), address, {"models.example"})


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost:8000"},
        {"host": "LOCALHOST", "origin": "http://localhost"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"},
        {"host": "[::1]:8000", "address": "::1", "origin": "http://[::1]:8000"},
        {"host": "0.0.0.0:8000"},
        {"host": "Models.Example", "origin": "https://models.example"},
        {"host": "127.0.0.1:8000", "origin": "https://models.example:8443"},  # as a reverse proxy passes it on
        {"host": "machine.lan:8000", "address": "10.0.0.5", "origin": "http://machine.lan:8000"},
        {"host": "localhost", "kind": _FORM},  # curl -d
        {"host": "localhost", "kind": ""},
        {"host": "localhost", "kind": "application/JSON; charset=utf-8"},
        {"host": "localhost", "method": "GET", "kind": "text/plain", "sec_fetch_site": "cross-site"},  # a link
    ],
)
def test_what_is_let_in(headers: dict[str, str]) -> None:
    check(**headers)


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"host": "other.example:8000"}, 403, "Host 'other.example:8000'.*--allow-host NAME"),
        ({"host": "other.example", "method": "GET"}, 403, "Host"),
        ({"host": "localhost.other.example"}, 403, "Host"),
        ({"host": "models.example.other"}, 403, "Host"),
        ({"host": "localhost@other.example"}, 403, "Host"),
        ({"host": "other.example", "origin": "http://other.example"}, 403, "Host"),  # DNS rebinding
        ({"host": "other.example", "address": "::1"}, 403, "Host"),
        ({"host": ""}, 403, "Host"),
        ({"host": "localhost:8000", "origin": "https://other.example"}, 403, "Origin 'https://other.example'"),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, 403, "Origin"),
        ({"host": "localhost:8000", "origin": "null"}, 403, "Origin"),
        ({"origin": "http://localhost:8000"}, 403, "Origin"),
        ({"host": "10.0.0.5:8000", "address": "10.0.0.5", "origin": "http://other.example"}, 403, "Origin"),
        ({"host": "localhost", "kind": "text/plain"}, 415, "content-type 'text/plain': send application/json"),
        ({"host": "localhost", "kind": "multipart/form-data; boundary=x"}, 415, "multipart/form-data"),
        ({"host": "localhost", "kind": _FORM, "sec_fetch_site": "cross-site"}, 415, "form"),
        ({"host": "localhost", "kind": "", "sec_fetch_site": "cross-site"}, 415, "content-type ''"),
    ],
)
def test_what_is_refused(headers: dict[str, str], status: int, message: str) -> None:
    with pytest.raises(Refusal, match=message) as found:
        check(**headers)
    assert found.value.status == status
