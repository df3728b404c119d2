"""Which synchronisations of a run keep nothing apart: arguments for mutants that change nothing.

From the journal of one run, without the vector clocks of `races`: what each warp touched between which barriers, and
from when to when asynchronous work was on its way. Barriers cut a block's run into intervals. Without one of them the
two intervals at its sides are one; that changes nothing iff no cell is written there by one warp and touched by
another. A weaker wait lets work end later; that changes nothing iff nothing meets it in the time that is added. Both
hold for every schedule of the same branches.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from tests.kernels.ptx import races
from tests.kernels.ptx.parsing import Program

_NEVER = 1 << 30


@dataclasses.dataclass
class _Async:
    """A group of asynchronous work of a warp: its cells, and when it was issued."""

    warp: int
    kind: int
    interval: int
    moment: int
    cells: list
    registers: set


class _Tile(NamedTuple):
    """A bulk copy: who issued it, when, its cells, and the mbarrier's agent and phase that bring it."""

    warp: int
    interval: int
    moment: int
    cells: np.ndarray
    agent: int
    phase: int


class Footprints:
    """What a run's `journal` says of each synchronisation of `program`."""

    def __init__(self, journal: list, program: Program, copies_need_fence: bool) -> None:
        self._program, self._copies_need_fence = program, copies_need_fence
        by_block: dict[int, list] = {}
        for block, *event in journal:
            by_block.setdefault(block, []).append(event)
        self._blocks = [_Block(events, program) for events in by_block.values()]
        self.reached = {place for block in self._blocks for place in block.reached}

    def argument(self, place: int, kind: str) -> str | None:
        """Why the mutant at `place` changes nothing; None: there is no such reason."""
        if any(block.named for block in self._blocks):
            return None
        if kind == "barrier":
            if any(block.votes.get(place) for block in self._blocks):
                return None
            meets = any(block.meets_without(place) for block in self._blocks)
            return None if meets else "nothing meets across it"
        if kind in ("wait for copies", "wait for products"):
            longer = [(block, block.longer(place)) for block in self._blocks]
            if not any(groups for _, groups in longer):
                return "nothing is outstanding"
            meets = any(block.meets(groups) for block, groups in longer)
            return None if meets else "nothing meets what it leaves"
        if kind == "proxy fence":
            return (
                None
                if any(block.mixed(self._copies_need_fence) for block in self._blocks)
                else "no proxy mixed"
            )
        if kind == "register fence":
            needed = any(block.register_fences.get(place) for block in self._blocks)
            return None if needed else "no register was touched since the last one"
        return None


class _Block:
    """One block's accesses as arrays: cell, warp, interval, moment, whether it writes, kind of agent."""

    def __init__(self, events: list, program: Program) -> None:
        self._program = program
        self.named = False
        self.reached: set[int] = set()
        self.register_fences: dict[int, bool] = {}
        self.votes: dict[int, bool] = {}
        """By place of a reduction at a barrier: whether it told a warp what its own lanes did not."""
        self._barriers: list[int] = []
        self._waits: dict[tuple[int, int], list] = {}  # by warp and kind: (moment, interval, place, commits)
        self._groups: dict[tuple[int, int, int], _Async] = {}  # by warp, kind and number
        self._touched: dict[int, list] = {}  # by warp: (moment, registers)
        self._tiles: list[_Tile] = []
        self._arrivals: dict[tuple[int, int], list] = {}  # by warp and agent of an mbarrier: (moment, phases)
        intervals: dict[int, int] = {}
        commits: dict[tuple[int, int], int] = {}
        spaces: dict[object, int] = {}
        rows = []
        for moment, (warp, what, *about) in enumerate(events):
            interval = intervals.get(warp, 0)
            if what == "barrier":
                barrier, place = about
                self.named |= barrier != 0
                self.reached.add(place)
                if interval == len(self._barriers):
                    self._barriers.append(place)
                self.named |= self._barriers[interval] != place
                intervals[warp] = interval + 1
            elif what == "commit":
                agent, number = about
                commits[warp, agent % races.AGENTS_A_WARP] = number
            elif what == "wait":
                agent, place = about
                kind = agent % races.AGENTS_A_WARP
                self.reached.add(place)
                self._waits.setdefault((warp, kind), []).append(
                    (moment, interval, place, commits.get((warp, kind), 0))
                )
            elif what == "arrival":
                agent, phases, place = about
                self.reached.add(place)
                self._arrivals.setdefault((warp, agent), []).append((moment, phases))
            elif what == "touch":
                self._touched.setdefault(warp, []).append((moment, about[0]))
            elif what == "use":
                self._group(warp, races.PRODUCTS, about[0], interval, moment).registers |= about[1]
            elif what == "fence":
                self.reached.add(about[0])
            elif what == "vote":
                place, differs = about
                self.votes[place] = self.votes.get(place, False) or differs
            elif what == "register fence":
                place, needed = about
                self.reached.add(place)
                self.register_fences[place] = self.register_fences.get(place, False) or needed
            else:
                space, kind, epoch, cells = about
                cells = np.unique(cells) + (spaces.setdefault(space, len(spaces)) << 40)
                write = what != "read"
                if kind == races.BULK:
                    self._tiles.append(_Tile(warp, interval, moment, cells, *epoch))
                if kind in (races.WARP, races.BULK):
                    rows.append((cells, warp, interval, moment, write, kind, 0))
                    continue
                group = self._group(warp, kind, epoch, interval, moment)
                group.cells.append((cells, write, interval, moment))
        self._rows = rows + [
            (cells, group.warp, interval, moment, write, group.kind, number)
            for (_, _, number), group in self._groups.items()
            for cells, write, interval, moment in group.cells
        ]
        sizes = [len(row[0]) for row in self._rows]
        self._cell = np.concatenate([row[0] for row in self._rows]) if sizes else np.zeros(0, np.int64)
        columns = np.array([row[1:] for row in self._rows], np.int64).reshape(-1, 6)
        columns = np.repeat(columns, sizes, axis=0).T
        self._warp, self._interval, self._moment, self._write, self._kind, self._group_of = columns
        self._ends = self._all_ends(None)
        self._spanned = self._expand()

    def _group(self, warp: int, kind: int, number: int, interval: int, moment: int) -> _Async:
        return self._groups.setdefault((warp, kind, number), _Async(warp, kind, interval, moment, [], set()))

    def _all_ends(self, weaker: int | None) -> dict:
        """When each group is known to be done, (interval, moment); `weaker`: a wait that leaves one more."""
        ends = {}
        for key in self._groups:
            warp, kind, number = key
            ends[key] = (len(self._barriers), _NEVER)
            for moment, interval, place, commits in self._waits.get((warp, kind), []):
                instruction = self._program.code[place]
                left = instruction.operands[0].bits if instruction.operands else 0
                if commits - left - (place == weaker) >= number:
                    ends[key] = (interval, moment)
                    break
        return ends

    def _expand(self) -> tuple[np.ndarray, ...]:
        """cell, warp, interval, write of all accesses, asynchronous ones in every interval that they last for."""
        plain = self._kind == races.WARP
        parts = [
            np.stack([column[plain] for column in (self._cell, self._warp, self._interval, self._write)])
        ]
        for key, group in self._groups.items():
            for cells, write, begin, _ in group.cells:
                for interval in range(begin, self._ends[key][0] + 1):
                    fixed = np.array([group.warp, interval, write])[:, None]
                    parts.append(np.vstack([cells[None], np.broadcast_to(fixed, (3, len(cells)))]))
        return tuple(np.unique(np.concatenate(parts, axis=1), axis=1))

    def meets_without(self, place: int) -> bool:
        """Whether accesses conflict in the intervals that are one without the barrier at `place`."""
        kept = np.array([barrier != place for barrier in self._barriers], np.int64)
        joined = np.concatenate([[0], np.cumsum(kept)])  # by interval
        if any(self._meets_tile(tile, joined) for tile in self._tiles):
            return True
        several = np.bincount(joined) > 1
        cell, warp, interval, write = self._spanned
        part = joined[interval]
        cell, warp, interval, write, part = (
            column[several[part]] for column in (cell, warp, interval, write, part)
        )
        if not len(cell):
            return False
        _, key = np.unique(np.stack([cell, part]), axis=1, return_inverse=True)
        key = key.reshape(-1)
        writes = write == 1

        def bounds(values, which):
            low, high = np.full(key.max() + 1, _NEVER), np.full(key.max() + 1, -1)
            np.minimum.at(low, key[which], values[which])
            np.maximum.at(high, key[which], values[which])
            return low, high

        first_writer, last_writer = bounds(warp, writes)
        first_reader, last_reader = bounds(warp, ~writes)
        begin, end = bounds(interval, writes)
        written, read = last_writer >= 0, last_reader >= 0
        alone = (first_writer == last_writer) & (first_reader == last_reader) & (first_writer == first_reader)
        return bool(
            (written & read & ~alone).any()
            or (written & (first_writer != last_writer) & (begin != end)).any()
        )

    def _meets_tile(self, tile: _Tile, joined: np.ndarray) -> bool:
        """Whether another warp touches a tile's memory with no barrier between, before it has seen the tile arrive."""
        seen = np.full(int(self._warp.max()) + 1, _NEVER)
        for (warp, agent), arrivals in self._arrivals.items():
            if agent == tile.agent:
                seen[warp] = min((at for at, phases in arrivals if phases >= tile.phase), default=_NEVER)
        part = joined[tile.interval]
        others = (self._warp != tile.warp) & (self._moment < seen[self._warp])
        plain = others & (self._kind != races.PRODUCTS) & (joined[self._interval] == part)
        # Products last: from their issue to their wait.
        last = np.zeros_like(self._interval)
        for key, (interval, _) in self._ends.items():
            if key[1] == races.PRODUCTS:
                last[(self._warp == key[0]) & (self._kind == key[1]) & (self._group_of == key[2])] = interval
        lasting = others & (self._kind == races.PRODUCTS)
        lasting &= (joined[self._interval] <= part) & (joined[last] >= part)
        return bool(np.isin(self._cell[plain | lasting], tile.cells).any())

    def longer(self, place: int) -> list:
        """(group's key, end, later end) of the groups that end later if the wait at `place` is weaker."""
        later = self._all_ends(place)
        return [(key, end, later[key]) for key, end in self._ends.items() if later[key] != end]

    def meets(self, groups: list) -> bool:
        """Whether anything touches a cell or a register of one of `groups` in the time that is added to it."""
        for key, (interval, moment), (last_interval, last_moment) in groups:
            own = self._warp == key[0]
            added = np.where(
                own,
                (self._moment > moment) & (self._moment < last_moment),
                (self._interval > interval) & (self._interval <= last_interval),
            )
            cells = np.concatenate([cells for cells, *_ in self._groups[key].cells])
            if key[1] == races.PRODUCTS:  # which only read
                added &= self._write == 1
            if np.isin(self._cell[added], cells).any():
                return True
            for at, registers in self._touched.get(key[0], []):
                if moment < at < last_moment and not self._groups[key].registers.isdisjoint(registers):
                    return True
        return False

    def mixed(self, copies_too: bool) -> bool:
        """Whether products read what was written by way of another proxy."""
        by_others = (self._write == 1) & (
            (self._kind == races.WARP) | copies_too & (self._kind == races.COPIES)
        )
        return bool(np.isin(self._cell[self._kind == races.PRODUCTS], self._cell[by_others]).any())
