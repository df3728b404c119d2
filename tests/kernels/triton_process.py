"""Processes in which Triton compiles, as this one has its interpreter on: the pinned version or the oldest one.

`.ci/setup --tests` installs the oldest supported Triton into a folder of the virtual environment that nothing has on
its path; machines with GPUs carry it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = Path(sys.prefix) / "oldest-triton"
PINNED = "pinned"
VERSIONS = (PINNED, "oldest")


def needs(version: str) -> None:
    """Skips where the oldest Triton is not installed; under `.ci/test`, which installs it, that is an error."""
    if version == PINNED or (OLDEST / "triton").is_dir():
        return
    if os.environ.get("LBDT_TEST_OLDEST_TRITON"):
        pytest.fail(f"expected the oldest supported Triton in {OLDEST}, where `.ci/setup --tests` puts it")
    pytest.skip("the oldest supported Triton is not installed: `.ci/setup --tests` does that")


def version_of(version: str) -> tuple[int, ...]:
    """(major, minor)"""
    path = {} if version == PINNED else {"path": [str(OLDEST)]}
    found = next(iter(importlib.metadata.distributions(name="triton", **path)))
    return tuple(int(part) for part in found.version.split(".")[:2])


def cache(tmp_path_factory) -> Path:
    """Triton's cache for this run of the tests, whichever process of xdist asks: what one compiles the others find."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "triton"


def lines(version: str, cache: Path, module: str, *arguments: str) -> list[dict]:
    """The JSON objects that `python -m module arguments` prints, a line each."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        # What Triton before 3.10 does without being told, and warns about.
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(
            [
                *([str(OLDEST)] if version != PINNED else []),
                *filter(None, [os.environ.get("PYTHONPATH")]),
            ]
        ),
    }
    # Of `.ci/test --misaligned`: what is compiled depends on where tensors lie.
    environment.pop("LD_PRELOAD", None)
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
