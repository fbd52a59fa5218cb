"""The address that the server's program is given."""

import runpy
import socket
from pathlib import Path

import pytest

from vishwamai_mp.config import UserError

_PROGRAM = Path(__file__).resolve().parents[2] / "examples/serving/server.py"


def test_an_address_that_cannot_be_listened_on_is_one_line() -> None:
    check = runpy.run_path(str(_PROGRAM))["check_address"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: Address already in use; name another"):
            check("127.0.0.1", port)
    check("127.0.0.1", port)
    with pytest.raises(UserError, match="--port 99999: ports are below 65536"):
        check("127.0.0.1", 99999)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 --port 0: "):  # an address of documentation, nobody's own
        check("192.0.2.1", 0)
