"""What a server on this machine starts, and what it ends: with a Ray that only notes what it is asked for."""

import sys
import types

import pytest

from lbdt.serving.server import APP, LocalServer
from lbdt.serving.settings import ServeSettings


class Ray:
    """The parts of Ray and Ray Serve that are used; `applications`: what runs on the cluster."""

    def __init__(self, running, applications):
        self.running, self.applications, self.done = running, dict.fromkeys(applications), []

    def modules(self):
        ray, serve = types.ModuleType("ray"), types.ModuleType("ray.serve")
        ray.serve, ray.is_initialized, ray.init, ray.shutdown = (
            serve,
            lambda: self.running,
            self.init,
            self.end,
        )
        serve.start, serve.run, serve.delete = lambda **options: None, self.run, self.delete
        serve.shutdown, serve.status = (
            self.shutdown,
            lambda: types.SimpleNamespace(applications=self.applications),
        )
        deployment = types.ModuleType("lbdt.serving.deployment")
        deployment.build = lambda settings: "app"
        return {"ray": ray, "ray.serve": serve, "lbdt.serving.deployment": deployment}

    def init(self, **options):
        self.running, self.options = True, options

    def run(self, app, name, **options):
        self.applications[name] = app

    def delete(self, name):
        del self.applications[name]

    def shutdown(self):
        assert self.running, "Serve would start Ray"
        self.applications.clear()
        self.done.append("serve")

    def end(self):
        self.running = False
        self.done.append("ray")


@pytest.fixture
def made(monkeypatch):
    def make(ray, **options):
        for name, module in ray.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        return LocalServer(ServeSettings(policy="p", audit="a"), port=0, **options)

    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "0")
    return make


def test_a_ray_of_its_own_is_started_whatever_runs_here_and_ended_once(made):
    ray = Ray(False, [])
    server = made(ray)
    assert ray.options["address"] == "local" and APP in ray.applications
    server.kill()
    server.kill()
    assert ray.done == ["serve", "ray"]


def test_a_replica_that_does_not_start_says_why(made, monkeypatch):
    ray = Ray(False, [])
    said = "The deployment failed to start 3 times in a row. Error:\nTraceback ...\nAuditError: audit: no space left\n"
    deployments = {"Server": types.SimpleNamespace(message=said), "Engine": types.SimpleNamespace(message="")}

    def fail(app, name, **options):
        ray.applications[name] = types.SimpleNamespace(deployments=deployments)
        raise RuntimeError("Deploying application lbdt failed.")

    monkeypatch.setattr(ray, "run", fail)
    with pytest.raises(RuntimeError, match="failed. AuditError: audit: no space left$"):
        made(ray)
    assert ray.done == ["serve", "ray"]


@pytest.mark.parametrize(
    ("running", "others", "done"),
    [
        (False, ["theirs"], ["ray"]),
        (False, [], ["serve", "ray"]),
        (True, ["theirs"], []),
        (True, [], ["serve"]),
    ],
    ids=["joined-with-others", "joined-alone", "in-a-program-with-others", "in-a-program-alone"],
)
def test_what_others_run_on_a_cluster_goes_on(made, running, others, done):
    ray = Ray(running, others)
    server = made(ray, ray_address=None if running else "auto")
    server.kill()
    assert list(ray.applications) == others and ray.done == done
