"""How Ray is started, or a cluster joined: the same for a server and for a job."""

from __future__ import annotations

import os
from typing import Any


def prepare(address: str | None) -> None:
    """Sets what Ray reads from the environment. Call it before anything imports Ray, which reads it then."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # By this variable's name for other systems only, but it is what makes Ray's own ports listen on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def options(address: str | None, cpus: int) -> dict[str, Any]:
    """What `ray.init` is called with: to join the cluster at `address` ("auto": this machine's), or, None, to start Ray
    here with `cpus` CPUs or this machine's, if those are more."""
    if address is not None:
        return {"address": address, "log_to_driver": False}
    return {
        "address": "local",  # or Ray would join what runs on this machine, or what RAY_ADDRESS names
        "num_cpus": max(os.cpu_count() or 1, cpus),
        "include_dashboard": False,
        "log_to_driver": False,
    }
