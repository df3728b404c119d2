"""`lbdt serve` over loopback, as `benchmarks.serving` has it in full: Ray Serve, real pictures, few of them."""

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from PIL import Image

from benchmarks import serving_load as load
from lbdt import canvas
from lbdt.serving.audit_check import verify
from tests.repeats import repeats
from tests.serving import malformed

TENANTS = load.tenant_names(12)
ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A running `lbdt serve`."""

    def __init__(self, folder):
        self.policy, self.audit = folder / "policy.toml", folder / "audit"
        # Its sockets lie below it, whose paths may not be long.
        self.ray = Path(tempfile.mkdtemp(prefix="ray-"))
        self.write_policy("1")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "lbdt",
            "serve",
            "--policy",
            str(self.policy),
            "--audit",
            str(self.audit),
        ]
        command += [
            "--port",
            str(port),
            "--steps",
            "2",
            "--batch",
            "4",
            "--threads",
            "1",
            "--policy-interval",
            "0.1",
        ]
        self.errors = (folder / "stderr").open("w+")
        environment = os.environ | {"RAY_TMPDIR": str(self.ray), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=folder, stderr=self.errors, env=environment)

    def write_policy(self, version):
        text = load.policy_text(TENANTS, canvas.OBJECTS, version, seed=3)
        beside = self.policy.with_suffix(".new")
        beside.write_text(text)
        beside.replace(self.policy)

    def state(self):
        return load.Client(self.url, 10).request("GET", "/ready").body

    def said(self):
        self.errors.seek(0)
        return self.errors.read()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    served = Served(folder)
    try:
        up = load.until(lambda: served.process.poll() is not None or load.ready(served.url, 0), 240)
        assert up and served.process.poll() is None, served.said()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                served.process.wait(60)
        for pid in load.descendants(served.process.pid):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        served.process.kill()
        served.errors.close()
        shutil.rmtree(served.ray, ignore_errors=True)


def test_pictures_of_many_tenants_together_are_those_of_each_alone(served):
    asked = load.asks(TENANTS, 24, seed=1)
    together = load.together(served.url, asked, clients=10)
    assert [reply.status for reply in together] == [200] * 24
    client = load.Client(served.url)
    for ask, reply in list(zip(asked, together, strict=True))[::4]:
        assert repeats(client.picture(ask).png, reply.png)
    records = {record["request"]: record for record in load.audited(served.audit)}
    for ask, reply in zip(asked, together, strict=True):
        record = records[reply.body["lbdt"]["request"]]
        assert (record["tenant"], record["seed"], record["outcome"]) == (ask.tenant, ask.seed, "protected")
        assert record["image"] == hashlib.sha256(reply.png).hexdigest()
        assert len(record["detected"]) == len(record["replaced"]) == 2


def test_the_openai_package_gets_a_picture(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=load.key_of(TENANTS[0]), max_retries=0)
    assert [model.id for model in client.models.list()] == ["EmojiCanvas"]
    made = client.images.generate(prompt="An image of Dogs in Sketch style.", n=2, extra_body={"seed": 4})
    pictures = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in made.data]
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    with pytest.raises(openai.BadRequestError, match="at most 1000 are taken"):
        client.images.generate(prompt="a" * 1001)
    with pytest.raises(openai.AuthenticationError, match="Expected an API key"):
        client.with_options(api_key="wrong").images.generate(prompt="a")


def test_malformed_requests_are_answered_in_a_sentence(served):
    bodies = [*malformed.bodies(7, 150), b"x" * 100_000, b"x" * 20_000_000]
    replies = load.flood(served.url, bodies, TENANTS[0])
    assert {reply.status // 100 for reply in replies} == {4}
    assert all(len(reply.sentence) > 10 for reply in replies)
    assert load.ready(served.url)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("GET", "/metrics", 200),
        ("GET", "/v1/images/generations", 405),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ],
    ids=lambda value: str(value),
)
def test_routes(served, method, path, status):
    reply = load.Client(served.url).request(method, path)
    assert reply.status == status
    if status >= 400:
        assert reply.body["error"]["code"] == "no_such_route"


def test_metrics_count_what_was_done(served):
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read().decode()
    assert 'lbdt_requests_total{replica="' in text and 'status="200"' in text
    assert "lbdt_queue" in text and "lbdt_patches_replaced_total" in text
    assert not any(tenant in text for tenant in TENANTS)


def test_a_client_who_leaves_has_its_work_dropped(served):
    # Many come, and leave when half of them are accepted; their pictures would take many batches.
    asked = load.asks(TENANTS, 80, seed=2)
    clients = [load.Client(served.url) for _ in asked]
    threads = [threading.Thread(target=c.picture, args=(ask,)) for c, ask in zip(clients, asked, strict=True)]
    for thread in threads:
        thread.start()
    assert load.until(lambda: served.state().get("queue", 0) >= 40, 20)
    for client in clients:
        client.leave()
    for thread in threads:
        thread.join()

    def gone():
        return [record for record in load.audited(served.audit) if record["reason"] == "client gone"]

    assert load.until(lambda: len(gone()) >= 20, 20), len(gone())
    assert load.until(lambda: served.state().get("queue") == 0, 20)
    assert load.Client(served.url).picture(asked[0]).status == 200


def versions_of(replies):
    return {reply.body["lbdt"]["policy"] for _, reply in list(replies) if reply.status == 200}


def test_each_request_is_of_one_version_of_the_policy_while_they_change(served):
    with load.Load(served.url, load.asks(TENANTS, 100, seed=4), clients=6) as running:
        for number in range(4):
            version = f"reload-{number}"
            served.write_policy(version)
            # However slow the machine is, there is a picture of each.
            assert load.until(lambda version=version: version in versions_of(running.replies), 60)
        served.policy.write_text("schema = 1\nversion =")
        assert load.until(lambda: served.state()["policy"]["rejected"], 30)
        assert served.state()["policy"]["version"] == "reload-3"
    served.write_policy("1")
    assert load.until(lambda: not served.state()["policy"]["rejected"], 30)
    records = {record["request"]: record for record in load.audited(served.audit)}
    concepts = {}
    for ask, reply in running.replies:
        assert reply.status == 200
        record = records[reply.body["lbdt"]["request"]]
        assert record["policy_version"] == reply.body["lbdt"]["policy"]
        concepts.setdefault((ask.tenant, record["policy_version"]), set()).add(tuple(record["concepts"]))
    assert len({version for _, version in concepts}) >= 4
    assert all(len(sets) == 1 for sets in concepts.values())


def test_a_killed_engine_leaves_nobody_without_an_answer(served):
    with load.Load(served.url, load.asks(TENANTS, 100, seed=5), clients=6) as running:
        time.sleep(1.0)
        load.kill_replica(served.process.pid)
        before = len(running.replies)
        assert load.until(
            lambda: sum(reply.status == 200 for _, reply in running.replies[before + 12 :]) > 6, 120
        )
    statuses = {reply.status for _, reply in running.replies}
    assert statuses <= {200, 503}
    assert all(reply.sentence for _, reply in running.replies if reply.status == 503)
    names = [(record["request"], record["index"]) for record in load.audited(served.audit)]
    assert len(set(names)) == len(names)


def test_nothing_of_a_request_is_in_the_logs_but_its_id(served):
    folder = served.ray
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".log", ".out", ".err", ".txt")
    ]
    assert found
    assert any(b" INFO req_" in path.read_bytes() for path in found)
    secrets = [b"An image of", b"key of tenant", b"tenant-00"]
    for path in found:
        text = path.read_bytes()
        assert not any(secret in text for secret in secrets), path


def test_it_ends_when_what_was_accepted_is_answered(served):
    replies = []
    asked = load.asks(TENANTS, 9, seed=6)
    threads = [
        threading.Thread(target=lambda ask=ask: replies.append(load.Client(served.url).picture(ask)))
        for ask in asked
    ]
    for thread in threads:
        thread.start()
    assert load.until(lambda: served.state().get("queue") == len(asked), 20)
    served.process.terminate()
    for thread in threads:
        thread.join()
    assert [reply.status for reply in replies] == [200] * len(asked)
    assert served.process.wait(60) == 0
    assert "finishing what was accepted" in served.said()
    summary = verify(served.audit)
    assert summary.outcomes["protected"] >= 50 and summary.outcomes["unprotected"] == 0
    assert json.dumps(summary.as_dict())
