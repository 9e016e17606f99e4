"""With this folder first on PYTHONPATH, Python reaches nothing but its own machine, in child processes and kernels too.

Used by `make test`. An attempt raises, and is logged in the file OFFLINE_LOG, in case the code hides the error.
"""

import os
import socket

LOCAL = ("127.", "localhost", "::1", "0.0.0.0")
_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _refuse_outside(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if isinstance(name, str) and name and not name.startswith(LOCAL) and name != socket.gethostname():
        if log := os.environ.get("OFFLINE_LOG"):
            with open(log, "a", encoding="utf-8") as file:  # noqa: PTH123 (pathlib would slow every start)
                file.write(f"{name}\n")
        raise OSError(f"the tests run offline: refused to reach {name}")


def _host(address: object) -> object:
    return address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a path


def connect(self: socket.socket, address: object) -> None:
    _refuse_outside(_host(address))
    return _connect(self, address)


def connect_ex(self: socket.socket, address: object) -> int:
    _refuse_outside(_host(address))
    return _connect_ex(self, address)


def getaddrinfo(host: object, *args: object, **kwargs: object) -> list:
    _refuse_outside(host)
    return _getaddrinfo(host, *args, **kwargs)


os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else the hub's client asks for a list of user agents, whatever is cached
socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
