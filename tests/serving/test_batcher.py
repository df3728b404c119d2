"""Batches of what waits: when they are formed, and of whose items."""

import asyncio
import threading

import pytest

from lbdt.serving.batcher import Batcher, ClosedError


class Gate:
    """A `run` that waits until it is let go on, and keeps the batches."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items):
        self.batches.append(list(items))
        self.begun.release()
        self.go.acquire()
        return [item * 10 for item in items]

    async def wait(self):
        await asyncio.to_thread(self.begun.acquire)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 20))


async def submitted(batcher, *pairs):
    tasks = [asyncio.create_task(batcher.submit(owner, item)) for owner, item in pairs]
    await asyncio.sleep(0)
    return tasks


def test_what_comes_while_a_batch_runs_is_the_next_one():
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=4, wait=0)
        first = await submitted(batcher, ("a", 1))
        await gate.wait()
        rest = await submitted(batcher, *(("a", item) for item in range(2, 8)))
        assert batcher.waiting == 6
        for _ in range(3):
            gate.go.release()
        assert await asyncio.gather(*first, *rest) == [10, 20, 30, 40, 50, 60, 70]
        assert gate.batches == [[1], [2, 3, 4, 5], [6, 7]]
        await batcher.close()

    run(scenario())


def test_an_idle_engine_waits_for_a_batch_to_fill():
    async def scenario():
        batches = []
        batcher = Batcher(lambda items: batches.append(list(items)) or items, most=8, wait=0.2)
        tasks = await submitted(batcher, ("a", 1))
        await asyncio.sleep(0.02)
        tasks += await submitted(batcher, ("b", 2), ("a", 3))
        await asyncio.gather(*tasks)
        assert batches == [[1, 2, 3]]
        await batcher.close()

    run(scenario())


@pytest.mark.parametrize(
    ("waiting", "batches"),
    [
        ([("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 5), ("c", 6)], [[1, 5, 6, 2], [3, 4]]),
        ([("a", 1), ("b", 2)], [[1, 2]]),
        ([("b", 9), ("a", 1), ("a", 2), ("b", 8), ("a", 3)], [[9, 1, 8, 2], [3]]),
    ],
    ids=["a-flood-of-one-tenant-does-not-hold-up-the-others", "one-each", "oldest-first-within-a-tenant"],
)
def test_owners_take_turns(waiting, batches):
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=4, wait=0)
        first = await submitted(batcher, ("x", 0))
        await gate.wait()
        rest = await submitted(batcher, *waiting)
        for _ in range(1 + len(batches)):
            gate.go.release()
        await asyncio.gather(*first, *rest)
        assert gate.batches[1:] == batches
        await batcher.close()

    run(scenario())


def test_a_batch_is_of_one_kind_and_the_others_come_next():
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=4, wait=0, kind=lambda item: item % 2)
        first = await submitted(batcher, ("x", 0))
        await gate.wait()
        rest = await submitted(batcher, ("a", 1), ("b", 2), ("c", 3), ("b", 4), ("d", 5), ("a", 7))
        for _ in range(3):
            gate.go.release()
        await asyncio.gather(*first, *rest)
        assert gate.batches[1:] == [[1, 3, 5, 7], [2, 4]]
        await batcher.close()

    run(scenario())


def test_what_is_cancelled_before_its_batch_is_not_run():
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=2, wait=0)
        first = await submitted(batcher, ("a", 1))
        await gate.wait()
        rest = await submitted(batcher, ("a", 2), ("a", 3), ("b", 4))
        rest[0].cancel()
        rest[2].cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        gate.go.release(2)
        assert await rest[1] == 30 and await first[0] == 10
        assert gate.batches == [[1], [3]]
        await batcher.close()

    run(scenario())


def test_all_that_waits_may_be_cancelled():
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=2, wait=0)
        first = await submitted(batcher, ("a", 1))
        await gate.wait()
        rest = await submitted(batcher, ("a", 2), ("b", 3))
        for task in rest:
            task.cancel()
        gate.go.release(2)
        await asyncio.gather(*first)
        again = await submitted(batcher, ("a", 4))
        assert await again[0] == 40
        assert gate.batches == [[1], [4]]
        await batcher.close()

    run(scenario())


class Panic(BaseException):
    """As Rust code has it."""


def panics(items):
    raise Panic


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda items: 1 // 0, "division"),
        (lambda items: [1], "expected 2 results, got 1"),
        (panics, "run: Panic"),
    ],
    ids=["raises", "too-few-results", "no-exception"],
)
def test_a_batch_that_fails_fails_its_items_and_no_other(fault, text):
    async def scenario():
        batcher = Batcher(lambda items: fault(items) if len(items) == 2 else items, most=2, wait=0.01)
        failing = await submitted(batcher, ("a", 1), ("b", 2))
        results = await asyncio.gather(*failing, return_exceptions=True)
        assert all(text in str(result) for result in results)
        assert await batcher.submit("a", 3) == 3
        assert batcher.is_alive
        await batcher.close()

    run(scenario())


def test_closing_finishes_what_was_taken_and_takes_no_more():
    async def scenario():
        gate = Gate()
        batcher = Batcher(gate, most=1, wait=0)
        tasks = await submitted(batcher, ("a", 1), ("a", 2), ("b", 3))
        closing = asyncio.create_task(batcher.close())
        await gate.wait()
        with pytest.raises(ClosedError, match="was closed"):
            await batcher.submit("a", 4)
        gate.go.release(3)
        await closing
        assert await asyncio.gather(*tasks) == [10, 20, 30]
        assert not batcher.is_alive

    run(scenario())
