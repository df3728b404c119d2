"""What else becomes of a request: clients who leave or send nothing, headers that come twice, faults of the server."""

import asyncio
import threading
import time

import pytest

from lbdt.serving import front as front_module
from lbdt.serving.audit import AuditLog
from lbdt.serving.audit_check import verify
from lbdt.serving.engine import Work
from lbdt.serving.front import single
from tests.serving.test_front import SEED, World, run


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_tenant_whose_name_is_not_ascii_has_its_own_rules(tmp_path):
    world = World(tmp_path, tenant_header="X-Tenant")
    world.policy_file.write_text(
        'schema = 1\nversion = "2"\n[defaults]\nunknown_tenant = "free"\n[tenants.free]\nconcepts = []\n'
        '[tenants."Bücher"]\nconcepts = ["Cats"]\n'
    )
    assert world.front.policy.refresh()
    run(world.ask(headers={"x-tenant": "Bücher".encode().decode("latin-1")}))
    assert world.works == [("Bücher", Work("a cat", SEED, ("Cats",)))]


def test_a_header_that_comes_twice_counts_for_nothing(tmp_path):
    sent = [("X-Tenant", "open"), ("x-tenant", "acme"), ("Content-Type", "application/json")]
    assert single(sent) == {"content-type": "application/json"}
    world = World(tmp_path, tenant_header="X-Tenant")

    async def body():
        yield b'{"prompt": "a"}'

    assert run(world.front.images(single(sent), body())).status == 401
    assert world.works == []


def test_who_leaves_while_the_audit_is_written_is_in_it(world, monkeypatch):
    writing, write = threading.Event(), AuditLog.write

    def slow_write(self, records):
        writing.set()
        time.sleep(0.2)
        return write(self, records)

    async def scenario():
        monkeypatch.setattr(AuditLog, "write", slow_write)
        task = asyncio.create_task(world.ask())
        await asyncio.to_thread(writing.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await world.front.drain()

    run(scenario())
    assert [record["outcome"] for record in world.records()] == ["protected"]
    assert verify(world.folder).finished
    assert world.metric('lbdt_pictures_total{outcome="protected"') != []


def test_a_body_that_comes_after_the_end_is_not_accepted(world):
    async def scenario():
        drained = asyncio.Event()

        async def body():
            yield b'{"prompt": '
            await drained.wait()
            yield b'"a"}'

        asked = asyncio.create_task(world.front.images({"authorization": "Bearer acme-key"}, body()))
        await asyncio.sleep(0.01)
        await world.front.drain()
        drained.set()
        answer = await asked
        assert (answer.status, answer.body["error"]["code"]) == (503, "shutting_down")

    run(scenario())
    assert world.works == []


async def endless():
    yield b"{"
    await asyncio.Event().wait()


async def broken_off():
    yield b"{"
    raise ConnectionError("secret")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [(endless, 408, "slow_body"), (broken_off, 400, "incomplete_body")],
    ids=["slow", "broken-off"],
)
def test_a_body_that_does_not_come(world, monkeypatch, caplog, body, status, code):
    monkeypatch.setattr(front_module, "BODY_SECONDS", 0.05)
    answer = run(world.front.images({"authorization": "Bearer acme-key"}, body()))
    assert (answer.status, answer.body["error"]["code"]) == (status, code)
    assert "secret" not in caplog.text and world.front.waiting == 0


def test_a_fault_of_the_server_is_told_by_its_kind_only(world, monkeypatch, caplog):
    def fail(self, records):
        raise KeyError("acme")

    monkeypatch.setattr(AuditLog, "write", fail)
    answer = run(world.ask())
    assert (answer.status, answer.body["error"]["code"]) == (500, "internal")
    assert "KeyError" in caplog.text and "acme" not in caplog.text and "data" not in answer.body


def test_a_rejected_policy_is_logged(tmp_path, caplog):
    world = World(tmp_path, policy_interval=0.02)
    world.policy_file.write_text("schema = 1\nversion =")

    async def scenario():
        watching = asyncio.create_task(world.front.watch_policy())
        while not caplog.records:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        watching.cancel()

    run(scenario())
    (record,) = caplog.records
    assert "version '1' stays in force" in record.getMessage() and "policy.toml" in record.getMessage()
