"""Batches of what waits, formed when the engine is free: many tenants in one call, none of them ahead of the others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ClosedError(RuntimeError):
    """The batcher takes nothing more."""


@dataclass
class _Waiting(Generic[T, R]):
    item: T
    future: asyncio.Future[R]


class Batcher(Generic[T, R]):
    """Calls `run` in a thread of its own with up to `most` of the items that wait, batch after batch.

    A batch is formed when the one before is done, not by a clock: under load it is full, as whatever came meanwhile is
    in it (Ray Serve's own batching closes a batch after its waiting time even while the replica is busy, so that small
    batches queue up). It is of one `kind` (say, size), that of whoever's turn it is, and its places go to the owners
    (tenants) in turn, oldest item first. What was cancelled before its batch began is left out.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R]],
        *,
        most: int,
        wait: float = 0.005,
        kind: Callable[[T], Hashable] = lambda item: None,
    ) -> None:
        """`run` returns a result for each item, in their order; what it raises is raised by each `submit`, as a
        RuntimeError of its kind where it is no Exception (a panic of Rust code is none). `wait`: the seconds that a
        batch which is not full waits for more, where nothing was running."""
        self._run, self._most, self._wait, self._kind = run, most, wait, kind
        self._owners: OrderedDict[Hashable, deque[_Waiting[T, R]]] = OrderedDict()
        self._come = asyncio.Event()
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lbdt-engine")
        self._task: asyncio.Task[None] | None = None
        self.batches = 0
        """How many were run."""

    @property
    def waiting(self) -> int:
        """How many items are not begun."""
        return sum(not one.future.done() for queue in self._owners.values() for one in queue)

    @property
    def is_alive(self) -> bool:
        """Whether what is submitted will be answered."""
        return not self._closed and (self._task is None or not self._task.done())

    async def submit(self, owner: Hashable, item: T) -> R:
        """The item's result. Cancelling it before its batch has begun drops the item.

        Raises:
            ClosedError: after `close`, or where its task has ended.
        """
        if not self.is_alive:
            raise ClosedError("submit: the batcher was closed")
        if self._task is None:
            self._task = asyncio.create_task(self._batches())
        waiting = _Waiting(item, asyncio.get_running_loop().create_future())
        self._owners.setdefault(owner, deque()).append(waiting)
        self._come.set()
        return await waiting.future

    async def close(self) -> None:
        """Takes nothing more, and finishes what was taken."""
        self._closed = True
        self._come.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown()

    async def _batches(self) -> None:
        loop = asyncio.get_running_loop()
        was_busy = False
        while True:
            if not self.waiting:
                self._owners.clear()
                if self._closed:
                    return
                self._come.clear()
                was_busy = False
                await self._come.wait()
                continue
            if not was_busy and self.waiting < self._most and not self._closed:
                await asyncio.sleep(self._wait)
            batch = self._next()
            if not batch:
                continue
            self.batches += 1
            was_busy = True
            try:
                results = await loop.run_in_executor(self._pool, self._run, [one.item for one in batch])
                if len(results) != len(batch):
                    raise RuntimeError(f"run: expected {len(batch)} results, got {len(results)}")
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                if not isinstance(error, Exception):
                    error = RuntimeError(f"run: {type(error).__name__}")
                for one in batch:
                    if not one.future.done():
                        one.future.set_exception(error)
                continue
            for one, result in zip(batch, results, strict=True):
                if not one.future.done():
                    one.future.set_result(result)

    def _next(self) -> list[_Waiting[T, R]]:
        """The next batch: an item of each owner in turn, again and again, of the kind of the first."""
        batch: list[_Waiting[T, R]] = []
        kind: Hashable = None
        skipped: set[Hashable] = set()
        while len(batch) < self._most and len(skipped) < len(self._owners):
            owner, queue = next(iter(self._owners.items()))
            while queue and queue[0].future.done():
                queue.popleft()
            if not queue:
                del self._owners[owner]
                continue
            self._owners.move_to_end(owner)
            if batch and self._kind(queue[0].item) != kind:
                skipped.add(owner)
                continue
            kind = self._kind(queue[0].item)
            batch.append(queue.popleft())
        # Who was passed over comes first in the next batch.
        for owner in [owner for owner in self._owners if owner in skipped][::-1]:
            self._owners.move_to_end(owner, last=False)
        return batch
