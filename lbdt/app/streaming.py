"""Work of a pipeline that is watched: in a thread of its own, its events as an iterator, one visitor at a time."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_PATIENCE = 0.1
"""Seconds after which one who waits for a turn asks whether it is still wanted."""
_LOCK = threading.Lock()
_TURNS: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()


class CancelledError(Exception):
    """Raised within work that is no longer wanted."""


def check_wanted(stop: Callable[[], bool]) -> None:
    """CancelledError where the work is no longer wanted."""
    if stop():
        raise CancelledError


@dataclass(frozen=True)
class Waiting:
    """Others have the pipeline, or had asked for it before."""

    ahead: int
    """How many."""


class Turns:
    """The visitors of one pipeline, in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._visitors: deque[object] = deque()

    @contextlib.contextmanager
    def turn(
        self, cancelled: Callable[[], bool], told: Callable[[Waiting], None] = lambda _: None
    ) -> Iterator[None]:
        """A block that is this visitor's turn. `told` of every change of how many are ahead, while there are any.

        Raises:
            CancelledError: `cancelled` became true before.
        """
        me, said = object(), 0
        with self._changed:
            self._visitors.append(me)
        try:
            with self._changed:
                while ahead := self._visitors.index(me):
                    if ahead != said:
                        said = ahead
                        told(Waiting(ahead))
                    check_wanted(cancelled)
                    self._changed.wait(_PATIENCE)
            yield
        finally:
            with self._changed:
                self._visitors.remove(me)
                self._changed.notify_all()


def turns_of(pipe: Any) -> Turns:
    """The turns of a pipeline, one for all that ask."""
    with _LOCK:
        return _TURNS.setdefault(pipe, Turns())


def stream(
    work: Callable[[Callable[[Any], None], Callable[[], bool]], None], cancelled: Callable[[], bool]
) -> Iterator[Any]:
    """The events of `work(emit, stop)`, which runs in a thread of its own from the first `next` on.

    The iterator ends when the work does, and early, without a last event, where it is cancelled; an error of the work
    is raised from it. `cancelled` is asked in the thread. Closing the iterator cancels too, and waits for the thread.
    """
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    closed = threading.Event()

    def run() -> None:
        try:
            work(lambda event: events.put(("event", event)), lambda: closed.is_set() or cancelled())
        except CancelledError:
            pass
        except BaseException as error:
            events.put(("error", error))
        events.put(("end", None))

    thread = threading.Thread(target=run, name="lbdt picture", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = events.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()
