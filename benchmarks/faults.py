"""Every command that writes, and everything that may go wrong while it does: are files lost, or of two runs mixed, and
does the same command end with the files of an unbroken run?

    python -m benchmarks.faults [--moments 10] [--jobs 2] [--only train ...] [--json FILE]

Faults: the end at once (kill -9, or the kernel's in the middle of a write) at moments spread over the run, SIGINT, a
full disk, a folder that may not be written to, and the same command twice at once. Commands that replace something
start from an older result of other settings, the others from an empty folder. Exits with 1 where a file was lost or
mixed, a resumed run differs, or a failure is not told in one line with the path. The disk that is full from the start
is a real one where root may mount it, and left out elsewhere; one that fills up is a limit on the size of files.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.faulty import Ended, Fault, Running, disk, run
from benchmarks.writers import COMMANDS, Command, commands, prepare, without_numbers
from lbdt.runs.files import json_bytes, read_json, write_file

FAULTS = ("kill -9", "SIGINT", "full disk", "read-only", "two at once")
_KILLS_EACH = 4
"""Kills for one SIGINT."""
_SPARE = 1 << 16
_TIMED = ("speed.jsonl", "times.json")
"""What runs measure about themselves."""
_TEMPORARY = ".lbdt-"
Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """Every file's contents but what killed runs leave behind, and what runs measure about themselves."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in _TIMED
        and not any(part.startswith(_TEMPORARY) for part in path.relative_to(folder).parts)
    }


class Trial:
    """One command in one place, before and after."""

    def __init__(self, command: Command, work: Path) -> None:
        self.command, self.work = command, work
        self.place = work / "place"
        self.before = self._made(command.older) if command.older else {"other.txt": b"mine"}
        self.wanted = self._made(command.arguments, self.before)
        self.changes = self.last.changes
        self.writes = [at for at, kind in enumerate(self.changes) if kind == "w"]
        self.counts = dict.fromkeys(("runs", "lost", "mixed", "resumed", "untold"), 0)

    def _made(self, arguments: Sequence[str], before: Files | None = None) -> Files:
        self.start(before or {"other.txt": b"mine"})
        began = time.perf_counter()
        self.last = run(self.line(arguments, before is not None), self.place)
        self.seconds = time.perf_counter() - began
        if self.last.code:
            raise RuntimeError(f"lbdt {' '.join(arguments)}: exit code {self.last.code}\n{self.last.errors}")
        return files(self.place)

    def line(self, arguments: Sequence[str], again: bool = True) -> tuple[str, ...]:
        """The whole command line."""
        more = self.command.again if again and self.command.older else ()
        return (*arguments, *more, "--out", str(self.place / self.command.out))

    def start(self, contents: Files) -> None:
        """Makes the place hold these files."""
        self.place.mkdir(parents=True, exist_ok=True)
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, data in contents.items():
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def same(self, one: Files, other: Files) -> bool:
        """Whether all that matters is the same."""
        return one.keys() == other.keys() and all(self.alike(name, one[name], other[name]) for name in one)

    def alike(self, name: str, one: bytes, other: bytes) -> bool:
        """Whether two files of this name are, but for times."""
        if re.fullmatch(self.command.timed, Path(name).name):
            one, other = without_numbers(one), without_numbers(other)
        return one == other

    def judge(self, before: Files, ended: Sequence[Ended], words: str | None = None) -> None:
        """Counts what a fault did, then runs the command again; `words`: what a failure has to say."""
        counts, after = self.counts, files(self.place)
        counts["runs"] += 1
        new = self.same(after, self.wanted)
        if self.command.older:
            old = after == before
            counts["lost"] += len(before.keys() - after.keys())
            counts["mixed"] += not (old or new)
        else:
            whole = [name for name in before if before[name] == self.wanted.get(name)]
            counts["lost"] += sum(after.get(name) != before[name] for name in whole)
            counts["mixed"] += sum(
                not self.alike(name, after[name], self.wanted[name])
                for name in after.keys() & self.wanted.keys()
                if not name.endswith(".jsonl") or not self.wanted[name].startswith(after[name])
            )
        failed = [one for one in ended if one.code == 1]
        if words is not None:
            told = [
                str(self.place) in one.told and any(w in one.told for w in words.split("|")) for one in failed
            ]
            counts["untold"] += not all(told) or (len(failed) != len(ended) and not new)
        if after == before:  # what the wanted files were made from
            counts["resumed"] += 1
            return
        again = run(self.line(self.command.arguments), self.place)
        counts["resumed"] += again.code == 0 and self.same(files(self.place), self.wanted)


def killed(trial: Trial, moments: int) -> None:
    """Ended at once at `moments`: in the middle of the last write and of others, before changes of every kind, and,
    where there are not as many, after some of the time."""
    torn = [trial.writes[-1 - at] for at in _spread(len(trial.writes), moments // 2)]
    places = _spread(len(trial.changes), moments - len(torn))
    late = moments - len(torn) - len(places)
    times = [trial.seconds * (number + 1) / late for number in range(late)]
    line = trial.line(trial.command.arguments)
    for fault, seconds in [
        *((Fault(torn=True, at=at), None) for at in torn),
        *((Fault(signal.SIGKILL, at=at), None) for at in places),
        *((Fault(), t) for t in times),
    ]:
        trial.start(trial.before)
        process = Running(line, trial.place, fault)
        if seconds is not None:
            time.sleep(seconds)
            process.kill()
        ended = process.wait()
        assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ, 0), ended
        trial.judge(trial.before, [ended])


def interrupted(trial: Trial, moments: int) -> None:
    """SIGINT, likewise; the process must end by itself, and not with 0."""
    for at in _spread(len(trial.changes), -(-moments // _KILLS_EACH)):
        trial.start(trial.before)
        ended = run(trial.line(trial.command.arguments), trial.place, Fault(signal.SIGINT, at=at))
        trial.judge(trial.before, [ended])
        trial.counts["untold"] += ended.code == 0 or "Traceback" in ended.errors


def full(trial: Trial, moments: int) -> None:
    """A disk without a free byte, where one can be mounted; and one that is full from a write in the middle on, and
    from the last."""
    line, words = trial.line(trial.command.arguments), "make room|are free"
    with disk(trial.place, sum(map(_rounded, trial.before.values())) + _SPARE) as mounted:
        if mounted:
            trial.start(trial.before)
            free = os.statvfs(trial.place)
            filler = trial.place / "filler"
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize))
            ended = run(line, trial.place)
            filler.unlink()
            left = files(trial.place)
    if mounted:
        trial.start(left)
        trial.judge(trial.before, [ended], words)
    for at in (trial.writes[len(trial.writes) // 2], trial.writes[-1]):
        trial.start(trial.before)
        trial.judge(trial.before, [run(line, trial.place, Fault(full=True, at=at))], words)


def forbidden(trial: Trial, moments: int) -> None:
    """Permissions that say no, to a process without root's rights."""
    trial.start(trial.before)
    folders = [trial.place, *(path for path in trial.place.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        ended = run(trial.line(trial.command.arguments), trial.place, Fault(powerless=True))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    trial.judge(trial.before, [ended], "you may not write there")
    trial.counts["untold"] += ended.code != 1


def twice(trial: Trial, moments: int) -> None:
    """Two at once: each is done, or refused because of the other, and one at least is done."""
    trial.start(trial.before)
    line = trial.line(trial.command.arguments)
    ended = [process.wait() for process in [Running(line, trial.place, Fault()) for _ in range(2)]]
    trial.judge(trial.before, ended, "is writing there")
    trial.counts["mixed"] += all(one.code for one in ended)


_DO: Mapping[str, Callable[[Trial, int], None]] = dict(
    zip(FAULTS, (killed, interrupted, full, forbidden, twice), strict=True)
)


def _spread(count: int, moments: int) -> list[int]:
    moments = min(count, moments)
    return [i * count // moments for i in range(moments)]


def _rounded(data: bytes) -> int:
    return -(-len(data) // 4096) * 4096 + 4096


def row(command: Command, work: Path, moments: int) -> None:
    """All faults of one command, to `work`/row.json."""
    trial, cells = Trial(command, work), {}
    for fault, do in _DO.items():
        trial.counts = dict.fromkeys(trial.counts, 0)
        do(trial, moments)
        cells[fault] = trial.counts
        sys.stderr.write(f"{work.name}, {fault}: {trial.counts}\n")
    write_file(work / "row.json", json_bytes(cells))


IMPORTED = (
    *("activations.batches", "activations.collecting", "activations.generated", "activations.pipelines"),
    *("activations.stored", "attack.pairs", "bench.runner", "canvas.defaults", "cli.erase_picture"),
    *("cli.conversion", "dictionary.selectivity", "editors", "evaluation.request"),
    *("evaluation.worlds.prompt_world", "hooks.blocks", "training.assignment", "training.heldout"),
    "training.recipe_training",
)
"""Modules of lbdt that the commands import when they run; these import the rest."""

OTHERS = (
    *("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codegen.cpp"),
    *("torch._inductor.codegen.cpp_wrapper_cpu_array_ref", "setuptools"),
    *("diffusers.guiders", "matplotlib.figure", "matplotlib.backends.backend_svg", "PIL.PngImagePlugin"),
)
"""Modules of other packages that are imported at their first use: to compile, to hook, to draw."""


def _import() -> None:
    """Everything that the commands would import, once for all that are forked; nothing is computed."""
    import diffusers
    import torch
    import transformers

    for package, names in (
        (diffusers, ("AutoencoderTiny", "DDIMScheduler", "StableDiffusionPipeline", "UNet2DConditionModel")),
        (transformers, ("CLIPTextModel", "CLIPTokenizer")),
    ):
        for name in names:
            getattr(package, name)
    for name in IMPORTED:
        importlib.import_module(f"lbdt.{name}")
    for name in OTHERS:
        importlib.import_module(name)
    gc.freeze()  # what is forked looks through none of it, and shares its memory
    torch.set_num_threads(1)


def _forked(works: Sequence[Callable[[], None]], jobs: int) -> None:
    """Does each in a process of its own, so many at a time: this one has to stay without threads."""
    waiting, running, failed = list(works), 0, False
    while waiting or running:
        while waiting and running < jobs:
            work, running = waiting.pop(0), running + 1
            if not os.fork():
                code = 1
                try:
                    work()
                    code = 0
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(code)
        failed |= os.wait()[1] != 0
        running -= 1
    if failed:
        raise RuntimeError("not all could be tried; what stopped it is above")


def table(rows: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Markdown: a row a command, a column a fault; files lost / mixed / runs that the same command made equal."""
    lines = ["| command | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for name, cells in rows.items():
        shown = [
            f"{c['lost']} / {c['mixed']} / {c['resumed']} of {c['runs']}"
            + (f", untold {c['untold']}" if c["untold"] else "")
            for c in cells.values()
        ]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return lines


def good(cell: Mapping[str, int]) -> bool:
    """Whether nothing was lost or mixed, every run could be resumed, and every failure was told in a line."""
    return not (cell["lost"] or cell["mixed"] or cell["untold"]) and cell["resumed"] == cell["runs"] > 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=10, help="of kill -9")
    parser.add_argument("--only", action="append", choices=COMMANDS)
    parser.add_argument("--jobs", type=int, default=1, help="commands that are tried at a time")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(arguments)
    _import()
    with tempfile.TemporaryDirectory(prefix="lbdt-faults-") as root:
        work = Path(os.path.realpath(root))
        _forked([lambda: prepare(work / "inputs")], 1)
        chosen = {n: c for n, c in commands(work / "inputs").items() if n in (args.only or COMMANDS)}
        _forked([partial(row, c, work / n, args.moments) for n, c in chosen.items()], args.jobs)
        rows = {name: read_json(work / name / "row.json") for name in chosen}
    sys.stdout.write("\n".join(table(rows)) + "\n")
    if args.json:
        write_file(args.json, json_bytes({"moments": args.moments, "commands": rows}))
    return 0 if all(good(cell) for cells in rows.values() for cell in cells.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
