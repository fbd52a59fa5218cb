"""Gloo's process groups of one process on one device: torch gives each its own, and each device a thread that polls.

A layout has some twenty groups, so each process had as many threads that looked a hundred times a second for messages
that seldom come: 2 % of a core for each waiting process on one machine, more where many share the cores.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextmanager
def groups_on_one_device() -> Iterator[None]:
    """Gloo's groups that are made meanwhile share this process's device; its devices, where GLOO_SOCKET_IFNAME has more
    networks than one.

    torch makes these groups without options, so meanwhile their class is one that sets them.
    """
    if not dist.is_gloo_available():
        yield
        return
    gloo: Any = dist.ProcessGroupGloo

    class OnSharedDevices(gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME"))
            options._threads = 2 * len(options._devices)  # that run a group's collectives, as torch has it
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    with mock.patch.object(dist.distributed_c10d, "ProcessGroupGloo", OnSharedDevices):
        yield


@cache
def _devices(interfaces: str | None) -> list[Any]:
    make: Any = dist.ProcessGroupGloo
    if not interfaces:
        return [make.create_default_device()]
    return [make.create_device(interface=name) for name in interfaces.split(",")]
