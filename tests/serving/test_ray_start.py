"""How Ray is started: by itself and for this machine alone, whatever else runs here."""

import os
import subprocess
import sys

import pytest

from lbdt.serving import ray_start


@pytest.mark.parametrize("cpus", [1, 1000])
def test_a_ray_of_ones_own_joins_nothing(cpus):
    options = ray_start.options(None, cpus)
    assert options["address"] == "local" and options["num_cpus"] == max(cpus, os.cpu_count())
    assert options["include_dashboard"] is False


def test_a_cluster_is_joined_as_it_is():
    assert ray_start.options("10.0.0.1:6379", 8) == {"address": "10.0.0.1:6379", "log_to_driver": False}


@pytest.mark.parametrize(("address", "reachable"), [(None, False), ("auto", True)], ids=["started", "joined"])
def test_a_job_prepares_before_ray_is_imported(tmp_path, address, reachable):
    """Ray's ports listen on loopback only if it was told so when it was imported."""
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a"}')
    code = f"""
import sys
from lbdt.serving import jobs
job = jobs.PictureJob("jobs.jsonl", "out", ["Cats"], ray=True, ray_address={address!r})
jobs._check(job)
assert "ray" not in sys.modules
from lbdt.serving import job_ray
from ray._private import ray_constants
print(ray_constants.ENABLE_RAY_CLUSTER)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(reachable)]
