"""Kernels with one synchronisation taken away or weakened: `python -m tests.kernels.ptx.mutants` tells which are found.

Every wait for groups leaves one group more, every barrier, fence and mbarrier wait is removed, one at a time. A mutant
is found if a run ends with an error or with other results than the reference; it is equivalent if `footprints` says why
it changes nothing; else it has survived. Prints a table, and the survivors.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable

from tests.kernels.ptx import footprints
from tests.kernels.ptx.cuda_cases import MUTATED_CUDA
from tests.kernels.ptx.instructions import step
from tests.kernels.ptx.machine import PLAIN, Misuse, Step, Stuck
from tests.kernels.ptx.matrices import asynchronous_registers
from tests.kernels.ptx.memory import BadAccess
from tests.kernels.ptx.parsing import Instruction
from tests.kernels.ptx.races import Race
from tests.kernels.ptx.running import Ready, Runnable
from tests.kernels.ptx.waits import always, by_itself, weakened

SEEDS = (0, 1, 2)
"""Asynchronous work as late as it may be, at once, and at random."""
LEAST = 0.95
"""Share of the mutants that change something that has to be found."""
FOUND, EQUIVALENT, SURVIVED, UNREACHED = "found", "equivalent", "survived", "not reached"


@dataclasses.dataclass(frozen=True)
class Mutant:
    case: str
    arch: int
    kernel: str
    kind: str
    text: str
    outcome: str
    why: str


def kind_of(instruction: Instruction) -> str | None:
    """What a synchronisation is called here; None: it is none."""
    match instruction.name:
        case "bar" | "barrier":
            return None if instruction.has("warp") else "barrier"
        case "cp" | "fence" if instruction.has("bulk") or instruction.has("tensormap_generic"):
            return None  # of tensor maps, whose bytes the machine does not follow
        case "cp" if instruction.has("wait_group") or instruction.has("wait_all"):
            return "wait for copies"
        case "wgmma" if instruction.has("wait_group"):
            return "wait for products"
        case "wgmma" if instruction.has("fence"):
            return "register fence"
        case "fence" if instruction.has("proxy"):
            return "proxy fence"
        case "mbarrier" if instruction.parts[1].endswith("wait"):
            return "mbarrier"
    return None


def sites(ready: Ready) -> list[tuple[int, str]]:
    """(place, kind) of every synchronisation of a launch's program."""
    found = ((place, kind_of(instruction)) for place, instruction in enumerate(ready.program.code))
    return [(place, kind) for place, kind in found if kind]


def mutated(ready: Ready, place: int, kind: str) -> list[Step]:
    """The program's steps with the synchronisation at `place` weakened or gone."""
    instruction = ready.program.code[place]
    steps = list(ready.steps)
    if kind.startswith("wait for") and instruction.operands:
        steps[place] = step(weakened(instruction), ready.program, asynchronous_registers(ready.program))
    elif kind == "mbarrier":
        steps[place] = steps[place]._replace(run=always(instruction, ready.program))
    elif instruction.has("red"):
        steps[place] = steps[place]._replace(kind=PLAIN, run=by_itself(instruction, ready.program))
    else:
        steps[place] = steps[place]._replace(kind=PLAIN, run=lambda warp, on: None)
    return steps


def compiled(name: str, arch: int) -> Runnable:
    """A case of either compiler. Triton is imported for its own alone: it may be absent, or have its interpreter on."""
    if name in MUTATED_CUDA:
        from tests.kernels.ptx.cuda_launching import CudaRun

        return CudaRun(MUTATED_CUDA[name])
    from tests.kernels.ptx.cases import CASES
    from tests.kernels.ptx.launching import Compiled

    return Compiled(CASES[name], arch)


class Judge:
    """A case whose launches have run without a mutation; `outcome` judges one mutant of one of them."""

    def __init__(self, name: str, arch: int) -> None:
        self.name, self.arch = name, arch
        self.compiled = compiled(name, arch)
        self._before, self._footprints, self._serialised = [], [], []
        self._arguments: dict[tuple[int, int], str | None] = {}
        self.compiled.restart()
        for ready in self.compiled.launches:
            self._before.append(self.compiled.memory.bytes.copy())
            journal: list = []
            self._serialised.append(ready.run(0, journal=journal).serialised)
            self._footprints.append(footprints.Footprints(journal, ready.program, ready.copies_need_fence))
        if wrong := self.compiled.wrong():
            raise AssertionError(f"{name} for sm_{arch} is wrong without a mutation: {wrong}")

    def mutants(self, launch: int) -> list[tuple[int, str]]:
        return sites(self.compiled.launches[launch])

    def reaches(self, launch: int, place: int) -> bool:
        return place in self._footprints[launch].reached

    def argument(self, launch: int, place: int, kind: str) -> str | None:
        """Why the mutant changes nothing here; None: there is no such reason."""
        if (launch, place) not in self._arguments:
            self._arguments[launch, place] = self._footprints[launch].argument(place, kind)
        return self._arguments[launch, place]

    def judge(self, launch: int, place: int, kind: str) -> Mutant:
        """What becomes of the mutant; raises `AssertionError` where one that changes nothing is found."""
        ready = self.compiled.launches[launch]
        about = (self.name, self.arch, ready.name, kind, f"{place}: {ready.program.code[place].text}")
        if not self.reaches(launch, place):
            return Mutant(*about, UNREACHED, "no run comes there")
        argument = self.argument(launch, place, kind)
        error = self._error(launch, place, kind, SEEDS if argument is None else SEEDS[:1])
        if argument and error:
            raise AssertionError(f"{about}: changes nothing, as {argument}, but: {error}")
        if argument:
            return Mutant(*about, EQUIVALENT, argument)
        return Mutant(*about, FOUND if error else SURVIVED, error or "no run differs")

    def _error(self, launch: int, place: int, kind: str, seeds: Iterable[int]) -> str | None:
        ready, memory = self.compiled.launches[launch], self.compiled.memory
        steps = mutated(ready, place, kind)
        for seed in seeds:
            memory.bytes[:] = self._before[launch]
            try:
                ran = ready.run(seed, steps)
                for later in self.compiled.launches[launch + 1 :]:
                    later.run(seed)
            except (Race, BadAccess, Misuse, Stuck) as error:
                return f"{type(error).__name__}: {error}"
            if ran.serialised - self._serialised[launch]:
                return "Misuse: registers of a matrix product that no wgmma.fence orders"
            if wrong := self.compiled.wrong():
                return f"wrong: {wrong}"
        return None


MUTATED = (
    *("half", "half, channels last", "float32, channels last", "half, update", "half, update, channels last"),
    *("many survivors", "many survivors, update", "many survivors, float32"),
    *("screened", "screened, few", "screened from afar"),
    *("ragged", "gated", "gated over calls", "topk", "record"),
    *("int8", "tensor maps"),
)
"""Cases whose kernels are mutated: each way of loading, and every kernel of Triton's."""


def mutated_cases(compiler: str | None) -> list[tuple[str, int]]:
    """(name, architecture) of all that are mutated whose kernels come from "triton" or from "nvcc"; None: from both."""
    of = [(name, 90) for name in MUTATED_CUDA] if compiler != "triton" else []
    if compiler != "nvcc":
        from tests.kernels.ptx.cases import CASES

        of += [(name, arch) for name in MUTATED for arch in CASES[name].archs]
    return of


def everything(of: Iterable[tuple[str, int]]) -> Iterable[tuple[Judge, int, int, str]]:
    """Every mutant of the cases `of`, (name, architecture), as (judge, launch, place, kind); of launches with the same
    code only the first one's that comes there, of nvcc's the first one's that it changes something for."""
    seen, elsewhere = set(), {}
    for name, arch in of:
        judge = Judge(name, arch)
        for launch, ready in enumerate(judge.compiled.launches):
            code = (arch, tuple(instruction.text for instruction in ready.program.code))
            for place, kind in judge.mutants(launch):
                mutant = judge, launch, place, kind
                if (code, place) in seen:
                    continue
                reached = judge.reaches(launch, place)
                # nvcc's kernels have two cases each. To look ahead in all of Triton's takes as long as to judge them.
                if reached and not (name in MUTATED_CUDA and judge.argument(launch, place, kind)):
                    seen.add((code, place))
                    elsewhere.pop((code, place), None)
                    yield mutant
                elif (code, place) not in elsewhere or (reached and not elsewhere[code, place][0]):
                    elsewhere[code, place] = reached, mutant
    yield from (mutant for _, mutant in elsewhere.values())


def sample(of: Iterable[tuple[str, int]], count: int) -> list[tuple[Judge, int, int, str]]:
    """`count` of everything, drawn: of each kind of synchronisation as many, as far as there are."""
    by_kind: dict[str, list] = {}
    for mutant in everything(of):
        by_kind.setdefault(mutant[3], []).append(mutant)
    generator = random.Random(count)
    for mutants in by_kind.values():
        generator.shuffle(mutants)
    rounds = itertools.zip_longest(*by_kind.values())
    return [mutant for taken in rounds for mutant in taken if mutant][:count]


def share_found(mutants: Iterable[Mutant]) -> float:
    """Of the mutants that change something, how many are found."""
    outcomes = Counter(mutant.outcome for mutant in mutants)
    changing = sum(outcomes.values()) - outcomes[EQUIVALENT]
    return outcomes[FOUND] / changing if changing else 1.0


def table(mutants: list[Mutant]) -> str:
    """A row for each kernel, architecture and kind of synchronisation."""
    rows: dict[tuple, Counter] = {}
    for mutant in mutants:
        rows.setdefault((mutant.kernel, f"sm_{mutant.arch}", mutant.kind), Counter())[mutant.outcome] += 1
    lines = [
        "| kernel | for | what | found | equivalent | survived | not reached |",
        "|---|---|---|---|---|---|---|",
    ]
    total: Counter = Counter()
    for counts in rows.values():
        total.update(counts)
    for key, counts in [*sorted(rows.items()), (("all", "", ""), total)]:
        cells = [*key, *(str(counts[outcome]) for outcome in (FOUND, EQUIVALENT, SURVIVED, UNREACHED))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--of",
        action="append",
        metavar="ARCH CASE",
        help='a case for an architecture, such as "90 half" (default: all that are mutated)',
    )
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, of every kind")
    parser.add_argument("--verbose", action="store_true", help="every mutant, with what it was found by")
    parser.add_argument("--json", action="store_true", help="an object a line for every mutant, no table")
    parser.add_argument("--compiler", choices=("triton", "nvcc"), help="only kernels of this one")
    given = parser.parse_args(arguments)
    of = [(name, int(arch)) for arch, name in (text.split(" ", 1) for text in given.of or ())]
    of = of or mutated_cases(given.compiler)
    mutants = []
    for judge, *which in sample(of, given.sample) if given.sample else everything(of):
        mutants.append(judge.judge(*which))
        if given.json:
            print(json.dumps(dataclasses.asdict(mutants[-1])), flush=True)
        elif given.verbose or mutants[-1].outcome in (SURVIVED, UNREACHED):
            print(*dataclasses.astuple(mutants[-1]), sep=" | ", flush=True)
    share = share_found(mutants)
    if not given.json:
        if any(mutant.case not in MUTATED_CUDA for mutant in mutants):
            print(f"Triton {importlib.metadata.version('triton')}\n")
        print(f"{table(mutants)}\n")
        print(f"{100 * share:.1f} % of the mutants that change something are found")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
