"""Happens-before by vector clocks: which accesses of shared and global memory have nothing that orders them.

An agent is a warp, its asynchronous copies, its matrix products, which read shared memory by themselves, or the bulk
copies that an mbarrier waits for. A clock [A]
holds for each agent the epoch up to which it is known to be done. An access is in order iff every conflicting access
before it is known to the clock of who makes it. This does not depend on the order in which the runner happens to
execute things: what it finds in one run would be found in any run that takes the same branches.

Source: Flanagan, Freund: FastTrack, PLDI 2009, with an epoch a reader and cell in place of its adaptive form.
"""

import numpy as np

AGENTS_A_WARP = 4
WARP, COPIES, PRODUCTS, BULK = range(AGENTS_A_WARP)
_KINDS = (
    *("warp {}", "the asynchronous copies of warp {}", "the matrix products of warp {}"),
    "the bulk copies to mbarrier {}",
)
NEVER = np.int32(0)


class Race(Exception):
    """Two accesses, one of them a write, that nothing orders; or memory that is read before anything wrote it."""


def name_of(agent: int, warps: int) -> str:
    """An agent in words, its block and its warp counted from 0."""
    warp, kind = divmod(agent, AGENTS_A_WARP)
    block, warp = divmod(warp, warps)
    return f"{_KINDS[kind].format(warp)} of block {block}"


class Accesses:
    """The last accesses of `cells` cells of memory by `agents` agents, beginning with `first`."""

    def __init__(self, cells: int, first: int, agents: int, warps: int) -> None:
        self._first, self._warps = first, warps
        self._agents = slice(first, first + agents)
        self._writer = np.full(cells, agents, np.int32)
        """Who wrote last; one past the agents: nobody."""
        self._written = np.zeros(cells, np.int32)
        self._place = np.full(cells, -1, np.int32)
        """Where in the program."""
        self._read = np.zeros((agents, cells), np.int32)
        self._added: np.ndarray | None = None
        """By atomics, which are in order among themselves."""

    def never_written(self, cells: np.ndarray) -> bool:
        """Whether one of `cells` holds nothing."""
        return bool((self._writer[cells] == self._read.shape[0]).any())

    def read(self, cells, agent: int, clock, epoch: int, place: int) -> None:
        """A read by `agent` whose knowledge is `clock`; raises `Race`."""
        known = self._known(clock)
        self._check_writes(cells, known, agent, "reads", place)
        self._check(self._added, cells, known, agent, "reads", "adds to", place)
        self._read[agent - self._first, cells] = epoch

    def write(self, cells, agent: int, clock, epoch: int, place: int) -> None:
        """A write, as `read`."""
        known = self._known(clock)
        self._check_writes(cells, known, agent, "writes", place)
        self._check(self._read, cells, known, agent, "writes", "reads", place)
        self._check(self._added, cells, known, agent, "writes", "adds to", place)
        self._writer[cells], self._written[cells], self._place[cells] = agent - self._first, epoch, place

    def rewrite(self, cells, agent: int, clock, epoch: int, place: int) -> None:
        """A write of the values that are there already, as `read`: in nobody's way but that of readers."""
        known = self._known(clock)
        self._check(self._read, cells, known, agent, "writes", "reads", place)
        self._check(self._added, cells, known, agent, "writes", "adds to", place)
        self._writer[cells], self._written[cells], self._place[cells] = agent - self._first, epoch, place

    def add(self, cells, agent: int, clock, epoch: int, place: int) -> None:
        """An atomic, as `read`; not in conflict with other atomics."""
        known = self._known(clock)
        self._check_writes(cells, known, agent, "adds to", place)
        self._check(self._read, cells, known, agent, "adds to", "reads", place)
        if self._added is None:
            self._added = np.zeros_like(self._read)
        self._added[agent - self._first, cells] = epoch

    def _known(self, clock: np.ndarray) -> np.ndarray:
        return np.append(clock[self._agents], np.int32(2**31 - 1))

    def _check_writes(self, cells, known, agent, does, place) -> None:
        missing = known[self._writer[cells]] < self._written[cells]
        if missing.any():
            cell = int(np.broadcast_to(cells, missing.shape)[missing][0])
            self._raise(agent, does, int(self._writer[cell]), "writes", cell, place, int(self._place[cell]))

    def _check(self, epochs, cells, known, agent, does, did, place) -> None:
        if epochs is None:
            return
        missing = epochs[:, cells] > known[:-1, None]
        if missing.any():
            other, which = (int(axis[0]) for axis in missing.nonzero())
            self._raise(agent, does, other, did, int(cells[which]), place, -1)

    def _raise(self, agent, does, other, did, cell, place, before) -> None:
        race = Race(
            f"{name_of(agent, self._warps)} {does} cell {cell}, which {name_of(other + self._first, self._warps)} "
            f"{did}; nothing orders the two"
        )
        race.places = [at for at in (place, before) if at >= 0]
        raise race
