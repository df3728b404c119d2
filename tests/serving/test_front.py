"""A request's way from its bytes to its pictures, with an engine that is made up."""

import asyncio
import base64
import hashlib
import json
import logging

import pytest

from lbdt.serving import audit as audit_module
from lbdt.serving.audit import AuditError, AuditLog
from lbdt.serving.audit_check import verify
from lbdt.serving.engine import Picture, Work
from lbdt.serving.front import Front, Served
from lbdt.serving.metrics import ServerMetrics
from lbdt.serving.outcome import Failure
from lbdt.serving.policy_watch import PolicyWatcher
from lbdt.serving.settings import ServeSettings

CONCEPTS = ("Cats", "Dogs", "Towers")
KEYS = {"acme": "acme-key", "open": "open-key", "soft": "soft-key"}
SEED = 5


def policy_text(version, acme=("Cats",)):
    def key(tenant):
        return f'keys = ["sha256:{hashlib.sha256(KEYS[tenant].encode()).hexdigest()}"]'

    return f"""
schema = 1
version = "{version}"
[tenants.acme]
concepts = {json.dumps(list(acme))}
{key("acme")}
[tenants.open]
concepts = []
{key("open")}
[tenants.soft]
concepts = ["Dogs", "Cats"]
on_failure = "unprotected"
{key("soft")}
"""


class World:
    """A front with all that it stands on; `make` is what the engine does."""

    def __init__(self, folder, make=None, **settings):
        self.policy_file, self.folder = folder / "policy.toml", folder / "audit"
        self.policy_file.write_text(policy_text("1"))
        self.works = []
        self.settings = ServeSettings(policy=self.policy_file, audit=self.folder, **settings)
        self.front = Front(
            self.settings,
            Served("EmojiCanvas", "ab" * 32, CONCEPTS),
            make or self.picture,
            PolicyWatcher(self.policy_file, CONCEPTS),
            AuditLog(self.folder),
            ServerMetrics("r1"),
        )

    async def picture(self, tenant, work):
        self.works.append((tenant, work))
        return Picture(f"{tenant} {work.seed}".encode(), True, (3, 0), (2, 0))

    async def ask(self, fields=None, key="acme-key", headers=None, body=None):
        raw = (
            json.dumps({"prompt": "a cat", "seed": SEED, **(fields or {})}).encode() if body is None else body
        )

        async def pieces():
            for start in range(0, len(raw), 1000):
                yield raw[start : start + 1000]

        given = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        return await self.front.images({**given, **(headers or {})}, pieces())

    def records(self):
        lines = [
            json.loads(line)
            for path in sorted(self.folder.iterdir())
            for line in path.read_text().splitlines()
        ]
        return [line["record"] for line in lines if "record" in line]

    def metric(self, line):
        return [text for text in self.front.metrics.text().decode().splitlines() if text.startswith(line)]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 30))


def test_a_request_gets_its_pictures_and_a_line_for_each(world):
    answer = run(world.ask({"n": 2}))
    assert answer.status == 200
    assert [base64.b64decode(one["b64_json"]) for one in answer.body["data"]] == [b"acme 5", b"acme 6"]
    assert [one["seed"] for one in answer.body["data"]] == [5, 6]
    assert answer.body["lbdt"] == {
        "request": answer.headers["x-request-id"],
        "policy": "1",
        "protected": True,
    }
    assert world.works == [("acme", Work("a cat", seed, ("Cats",), "refuse")) for seed in (5, 6)]
    first, second = world.records()
    assert first["image"] == hashlib.sha256(b"acme 5").hexdigest()
    assert (second["request"], second["index"]) == (answer.headers["x-request-id"], 1)
    assert first["concepts"] == ["Cats"] and first["detected"] == [3, 0] and first["replaced"] == [2, 0]
    assert first["outcome"] == "protected" and first["policy_version"] == "1"
    assert verify(world.folder).outcomes["protected"] == verify(world.folder).pictures == 2
    assert world.metric('lbdt_pictures_total{outcome="protected"') == [
        'lbdt_pictures_total{outcome="protected",replica="r1"} 2.0'
    ]
    assert world.metric("lbdt_patches_replaced_total") == ['lbdt_patches_replaced_total{replica="r1"} 4.0']


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"key": "wrong"}, 401, "invalid_api_key"),
        ({"headers": {"authorization": ""}}, 401, "invalid_api_key"),
        ({"headers": {"authorization": "Basic acme-key"}}, 401, "invalid_api_key"),
        ({"headers": {"authorization": "Bearer "}}, 401, "invalid_api_key"),
        ({"headers": {"x-tenant": "acme", "authorization": ""}}, 401, "invalid_api_key"),
        ({"headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"body": b"{" * 70_000}, 413, "too_large"),
        ({"headers": {"content-length": "70000"}}, 413, "too_large"),
        ({"headers": {"content-length": "-1"}}, 400, "invalid_value"),
        ({"body": b"{"}, 400, "invalid_value"),
        ({"fields": {"n": 9}}, 400, "invalid_value"),
    ],
    ids=[
        "wrong-key",
        "no-key",
        "another-scheme",
        "empty-key",
        "a-header-that-is-not-trusted",
        "content-type",
        "body-too-large",
        "length-too-large",
        "length-no-number",
        "no-json",
        "bad-value",
    ],
)
def test_what_is_let_in(world, change, status, code):
    answer = run(world.ask(**change))
    assert (answer.status, answer.body["error"]["code"]) == (status, code)
    assert world.works == [] and world.records() == []
    assert world.metric("lbdt_refusals_total{") == [f'lbdt_refusals_total{{code="{code}",replica="r1"}} 1.0']


def test_a_gateway_may_name_the_tenant(tmp_path):
    world = World(tmp_path, tenant_header="X-Tenant")

    async def scenario():
        for tenant, status, code in (
            ("acme", 200, None),
            ("nobody", 403, "unknown_tenant"),
            ("", 401, "no_tenant"),
            ("a" * 101, 401, "no_tenant"),
            ("a\x00", 401, "no_tenant"),
            ("\xff", 401, "no_tenant"),
            ("犬", 401, "no_tenant"),
        ):
            answer = await world.ask(key="open-key", headers={"x-tenant": tenant})
            assert (answer.status, answer.body.get("error", {}).get("code")) == (status, code)

    run(scenario())
    assert [tenant for tenant, _ in world.works] == ["acme"]


@pytest.mark.parametrize(
    ("failure", "status", "outcome"),
    [
        (Failure("prompt_too_long", "prompt: 100 tokens"), 400, "failed"),
        (Failure("not_protected", "NaN in the activations"), 500, "refused"),
        (Failure("failed", "OutOfMemoryError"), 500, "failed"),
        (Failure("gone", "ActorDiedError"), 503, "failed"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_picture_that_fails_takes_its_request_with_it(tmp_path, failure, status, outcome):
    async def make(tenant, work):
        return failure if work.seed == SEED + 1 else Picture(b"png", True)

    world = World(tmp_path, make)
    answer = run(world.ask({"n": 2}))
    assert (answer.status, answer.body["error"]["code"]) == (status, failure.kind)
    assert "data" not in answer.body
    first, second = world.records()
    assert (first["outcome"], first["image"], first["reason"]) == (
        "refused",
        None,
        "another picture of the request was not made",
    )
    assert (second["outcome"], second["image"], second["reason"]) == (outcome, None, failure.reason)


def test_what_an_engine_raises_is_told_by_its_kind_only(tmp_path):
    async def make(tenant, work):
        raise KeyError(work.prompt)

    world = World(tmp_path, make)
    answer = run(world.ask({"prompt": "secret"}))
    assert answer.status == 500 and "secret" not in json.dumps(answer.body)
    assert world.records()[0]["reason"] == "KeyError"


def test_an_unprotected_picture_says_so(tmp_path):
    async def make(tenant, work):
        assert work.on_failure == "unprotected" and work.concepts == ("Cats", "Dogs")
        return Picture(b"png", False, reason="NaN")

    world = World(tmp_path, make)
    answer = run(world.ask(key="soft-key"))
    assert answer.status == 200 and answer.body["lbdt"]["protected"] is False
    assert answer.body["data"][0]["protected"] is False and answer.body["data"][0]["reason"] == "NaN"
    (record,) = world.records()
    assert (record["outcome"], record["fallback"], record["reason"]) == ("unprotected", "unprotected", "NaN")


def test_without_an_audit_no_picture_leaves(world, monkeypatch):
    def full(self, records):
        raise AuditError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(audit_module.AuditLog, "write", full)
        answer = run(world.ask())
        assert (answer.status, answer.body["error"]["code"]) == (503, "audit")
        assert "data" not in answer.body and answer.headers["retry-after"] == "30"
        assert world.front.state() == (False, world.front.state()[1])
        assert world.front.state()[1]["faults"] == ["the audit cannot be written"]
    assert run(world.ask()).status == 200
    assert world.front.state()[0]


def slow(started, go):
    async def make(tenant, work):
        started.release()
        await go.wait()
        return Picture(b"png", True)

    return make


@pytest.mark.parametrize(
    ("limits", "keys", "refused"),
    [
        ({"max_queue": 2, "max_tenant_queue": 2, "max_n": 1}, ["acme", "soft", "open"], "The queue is full"),
        (
            {"max_queue": 8, "max_tenant_queue": 1, "max_n": 1},
            ["acme", "acme"],
            "This tenant's part of the queue is full",
        ),
    ],
    ids=["of-all", "of-a-tenant"],
)
def test_a_full_queue_says_when_to_come_again(tmp_path, limits, keys, refused):
    async def scenario():
        started, go = asyncio.Semaphore(0), asyncio.Event()
        world = World(tmp_path, slow(started, go), **limits)
        tasks = [asyncio.create_task(world.ask(key=KEYS[key])) for key in keys[:-1]]
        for _ in tasks:
            await started.acquire()
        answer = await world.ask(key=KEYS[keys[-1]])
        assert answer.status == 429 and refused in answer.body["error"]["message"]
        assert answer.body["error"]["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        go.set()
        assert [(await task).status for task in tasks] == [200] * len(tasks)
        assert world.front.waiting == 0
        assert (await world.ask(key=KEYS[keys[-1]])).status == 200

    run(scenario())


def test_what_takes_too_long_is_dropped_and_answered(tmp_path):
    cancelled = []

    async def make(tenant, work):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(work.seed)
            raise

    world = World(tmp_path, make, timeout=0.05)
    answer = run(world.ask({"n": 2}))
    assert (answer.status, answer.body["error"]["code"]) == (504, "timeout")
    assert cancelled == [5, 6]
    assert [record["reason"] for record in world.records()] == ["timed out"] * 2


def test_a_client_who_leaves_is_in_the_audit_and_its_work_is_dropped(tmp_path):
    async def scenario():
        started, go = asyncio.Semaphore(0), asyncio.Event()
        world = World(tmp_path, slow(started, go))
        task = asyncio.create_task(world.ask())
        await started.acquire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.front.waiting == 0
        await world.front.drain()
        (record,) = world.records()
        assert (record["outcome"], record["reason"], record["image"]) == ("failed", "client gone", None)

    run(scenario())


def test_each_request_is_of_one_version_of_the_policy(tmp_path):
    async def scenario():
        started, go = asyncio.Semaphore(0), asyncio.Event()
        seen = []

        async def make(tenant, work):
            seen.append(work.concepts)
            return await slow(started, go)(tenant, work)

        world = World(tmp_path, make, policy_interval=0.02)
        watching = asyncio.create_task(world.front.watch_policy())
        first = asyncio.create_task(world.ask())
        await started.acquire()
        for version, text in (("2", policy_text("2", ["Towers"])), ("broken", "schema = 1\nversion =")):
            world.policy_file.write_text(text)
            for _ in range(200):
                await asyncio.sleep(0.02)
                policy = world.front.state()[1]["policy"]
                if policy["version"] == version or policy["rejected"]:
                    break
        assert policy["version"] == "2" and policy["rejected"]
        second = asyncio.create_task(world.ask())
        await started.acquire()
        go.set()
        answers = [await first, await second]
        assert [answer.body["lbdt"]["policy"] for answer in answers] == ["1", "2"]
        assert seen == [("Cats",), ("Towers",)]
        assert [(r["policy_version"], r["concepts"]) for r in world.records()] == [
            ("1", ["Cats"]),
            ("2", ["Towers"]),
        ]
        watching.cancel()
        assert len(world.metric("lbdt_policy_reloads_total{")) == 2

    run(scenario())


def test_draining_finishes_what_was_accepted_and_takes_no_more(tmp_path):
    async def scenario():
        started, go = asyncio.Semaphore(0), asyncio.Event()
        world = World(tmp_path, slow(started, go))
        first = asyncio.create_task(world.ask())
        await started.acquire()
        draining = asyncio.create_task(world.front.drain())
        await asyncio.sleep(0.01)
        late = await world.ask()
        assert (late.status, late.body["error"]["code"]) == (503, "shutting_down")
        assert not draining.done() and not world.front.state()[0]
        go.set()
        assert (await first).status == 200
        await draining
        summary = verify(world.folder)
        assert summary.finished and summary.outcomes["protected"] == summary.pictures == 1

    run(scenario())


def test_the_log_has_a_requests_id_and_nothing_else_of_it(world, caplog):
    caplog.set_level(logging.DEBUG)
    answer = run(world.ask({"prompt": "secret"}))
    run(world.ask({"prompt": "secret\x00"}))
    text = caplog.text
    assert answer.headers["x-request-id"] in text
    assert not any(word in text for word in ("secret", "acme", "Cats"))
