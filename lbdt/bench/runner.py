"""Measures cases and collects them in one result: `lbdt bench`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lbdt.bench import cases, hardware, shapes, timing
from lbdt.bench.cases import PLAIN, Spec, TimedCase

BENCHMARK = "lbdt bench"
_SHAPE = "sd15-b1"
"""What the targets are for: only times at sizes of a real hookpoint count."""
_MB = 1e6
_MOST_EXTRA = 3 * _MB
_MOST_ATTACHED = 32 * _MB


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. Empty sequences: everything."""

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    shares: Sequence[float] = ()
    dtypes: Sequence[str] = ()
    """Names of DTYPES; empty: float32 on the CPU, float16 on a GPU."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    quick: bool = False
    """Small sizes instead of real ones; no targets."""
    rounds: int | None = None
    """The most rounds of a case; None: 15, on a GPU 50, quick 3."""
    budget: float = 2.5
    """Seconds for the rounds of a case; at least 3 rounds are made."""
    unet: bool = False
    """Times a UNet step too."""
    cold: bool = False
    """Times each case a second time on a CPU, with cold caches, as the rest of a denoiser leaves them; a GPU's are
    always cold."""

    def specs(self) -> list[Spec]:
        """The cases, in the order in which they are measured; ValueError for what cannot be asked for."""
        known = (shapes.QUICK if self.quick else shapes.SHAPES) | shapes.HOST
        for name in self.shapes:
            if name not in known:
                raise ValueError(f"--shape {name}: expected one of {', '.join(known)}")
        for op in self.ops:
            if op not in cases.OPS:
                raise ValueError(f"--op {op}: expected one of {', '.join(cases.OPS)}")
        for dtype in self.dtypes:
            if dtype not in cases.DTYPES:
                raise ValueError(f"--dtype {dtype}: expected one of {', '.join(cases.DTYPES)}")
        on_gpu = self.device.type == "cuda"
        # Eight images take seconds a call on a CPU, and grow with the share as one does.
        slow = [] if on_gpu or self.shapes else [name for name in known if known[name].images > 1]
        found = cases.specs(
            self.ops or cases.OPS,
            self.shapes or (shapes.QUICK if self.quick else known),
            self.shares or shapes.SHARES,
            self.dtypes or ["float16" if on_gpu else "float32"],
            shortened=slow,
            measured=() if self.quick or self.shares else (_SHAPE,),
        )
        if not found:
            raise ValueError(
                f"--op {', '.join(self.ops)}: has no case at --shape {', '.join(self.shapes)}, where only the hook is "
                "timed"
            )
        return found

    def command(self) -> str:
        """A command line that measures the same."""
        words = ["lbdt", "bench", "--device", str(self.device), "--seed", str(self.seed)]
        for option, values in (
            ("--op", self.ops),
            ("--shape", self.shapes),
            ("--share", [f"{100 * share:g}" for share in self.shares]),
            ("--dtype", self.dtypes),
            ("--rounds", [] if self.rounds is None else [str(self.rounds)]),
        ):
            words += [word for value in values for word in (option, value)]
        words += ["--quick"] * self.quick + ["--unet"] * self.unet + ["--cold"] * self.cold
        return f"{shlex.join(words)} --threads {torch.get_num_threads()}"

    @property
    def most_rounds(self) -> int:
        """The most rounds of a case."""
        return self.rounds or (3 if self.quick else 50 if self.device.type == "cuda" else 15)


def run(options: BenchOptions, progress: Callable[[list[Spec]], Iterator[Spec]] = iter) -> dict[str, Any]:
    """The result as plain values; `progress` may wrap the list of cases.

    Raises:
        Mismatch: versions disagree.
        ValueError: what cannot be asked for.
    """
    wanted = options.specs()
    about = hardware.describe(options.device)
    quick = shapes.QUICK["quick"] if options.quick else shapes.SHAPES["sd15-b1"]
    limits = {
        name: hardware.limits(options.device, cases.DTYPES[name], quick, options.quick)
        for name in dict.fromkeys(spec.dtype for spec in wanted)
    }
    skipped: dict[str, str] = {}
    rows = []
    before = None
    for spec in progress(wanted):
        if before != (spec.op, spec.shape, spec.dtype):
            torch.compiler.reset()  # what was compiled for other sizes would be looked through at every call
            before = (spec.op, spec.shape, spec.dtype)
        row = measure(spec, options, limits[spec.dtype], skipped)
        if row is not None:
            rows.append(row)
    step = None
    if options.unet:
        from lbdt.bench.unet import measure as measure_unet

        try:
            step = measure_unet(options.device, options.quick, options.most_rounds, options.seed)
        except ImportError as error:
            skipped["UNet step"] = _first_line(error)
    names = dict.fromkeys(spec.shape for spec in wanted)
    known = shapes.SHAPES | shapes.QUICK | shapes.HOST
    return {
        "benchmark": BENCHMARK,
        "command": options.command(),
        **about,
        "load_average_after": round(os.getloadavg()[0], 2),
        "seed": options.seed,
        "quick": options.quick,
        "limits": limits,
        "shapes": {name: known[name]._asdict() | {"batch": known[name].batch} for name in names},
        "rows": rows,
        "skipped": skipped,
        "unet": step,
        "targets": None if options.quick else targets(rows, step, options.device.type),
    }


@torch.inference_mode()
def measure(
    spec: Spec, options: BenchOptions, limits: dict[str, Any], skipped: dict[str, str]
) -> dict[str, Any] | None:
    """Times, peak memory and floor of one case, or None with an entry in `skipped`."""
    try:
        case = cases.build(spec, options.device, options.seed)
    except ImportError as error:  # the hook without diffusers
        skipped[spec.op] = _first_line(error)
        return None
    versions = _usable(case, skipped)
    count = case.check(versions)
    measured: dict[str, dict[str, Any]] = {
        name: hardware.peaks(function, options.device) for name, function in versions.items()
    }
    times = timing.in_turn(versions, options.device, options.most_rounds, options.budget)
    for name in versions:
        measured[name] |= times[name]
    if options.cold and options.device.type != "cuda":
        times = timing.in_turn(versions, options.device, options.most_rounds, options.budget, cold=True)
        for name in versions:
            measured[name]["cold"] = times[name]["ms"]
    if options.device.type == "cuda":
        measured["ours"]["graph"] = timing.graph(versions["ours"], options.device, options.most_rounds)
    return row(case, measured, count, limits)


def row(
    case: TimedCase, measured: dict[str, dict[str, Any]], count: int | None, limits: dict[str, Any]
) -> dict[str, Any]:
    """A row of the result. `own_ms` is a version's median without the bare call's, `own_cold_ms` the same with cold
    caches where they were timed; ratios are of warm ones."""
    bare = measured[case.bare]["ms"]["median"] if case.bare else 0.0
    for version in measured.values():
        version["own_ms"] = version["ms"]["median"] - bare
        if "cold" in version:
            bare_cold = measured[case.bare]["cold"]["median"] if case.bare else 0.0
            version["own_cold_ms"] = version["cold"]["median"] - bare_cold
    ours = measured["ours"]
    others = [name for name in measured if name not in ("ours", case.bare)]
    floor = floor_of(case.bytes, case.flops, limits)
    graph = ours.get("graph", {})
    best = graph["cold"]["median"] - bare if "cold" in graph and not case.bare else ours["own_ms"]
    return {
        **case.spec._asdict(),
        "count": count,
        "backend": case.backend,
        "equal": True,
        "versions": measured,
        "ratio": {name: measured[name]["own_ms"] / ours["own_ms"] for name in others},
        "attach_bytes": case.attach_bytes,
        "floor": floor,
        "times_the_floor": best / floor["ms"],
    }


def floor_of(size: int, flops: int, limits: dict[str, Any]) -> dict[str, Any]:
    """The longer of moving `size` bytes and computing `flops` at the measured rates. Less is possible where
    the inputs lie in a cache."""
    parts = {"memory": size / limits["bytes_per_second"], "product": flops / limits["flops_per_second"]}
    bound = max(parts, key=lambda name: parts[name])
    return {"bytes": size, "flops": flops, "ms": 1e3 * parts[bound], "bound": bound}


def _usable(case: TimedCase, skipped: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """The versions without the compiled one where it cannot be compiled here (no compiler, no Triton)."""
    versions = dict(case.versions)
    if "compiled" in versions:
        try:
            versions["compiled"]()
        except Exception as error:  # of torch's own kinds, which depend on the version; the result names it
            skipped[f"{case.spec.op}, compiled"] = _first_line(error)
            del versions["compiled"]
    return versions


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def targets(rows: list[dict[str, Any]], unet: dict[str, Any] | None, device: str) -> list[dict[str, Any]]:
    """What the times have to be, and whether they are: `{"target": text, "got": number or None, "met": bool}` for each
    target that the rows speak about."""
    found: list[dict[str, Any]] = []

    def add(text: str, got: float | None, met: bool) -> None:
        found.append({"target": text, "got": got, "met": met})

    def least(text: str, rows: list[dict[str, Any]], baseline: str, wanted: float) -> None:
        ratios = [row["ratio"][baseline] for row in rows if baseline in row["ratio"]]
        if ratios:
            add(
                f"{text}: at least {wanted:g} times as fast as {baseline}", min(ratios), min(ratios) >= wanted
            )

    for name, most in (("present", 0.5), ("absent", 0.2)):
        if unet is not None:
            got = unet[name]["percent_of_step"]
            add(f"hook, concept {name}, as measured: under {most:g} % of a UNet step", got, got < most)
    detect = _pick(rows, "detect_patches", "")
    hook = _pick(rows, "hook", "")
    if device == "cuda":
        for share in (0.5, 1.0):
            for row in detect(share):
                got = row["times_the_floor"]
                add(f"detect_patches, {share:.0%}: within 1.5 times its floor", got, got <= 1.5)
        for row in detect(0.0):
            # What cannot be captured is not fast: the target is missed, and the row says why.
            warm = row["versions"]["ours"].get("graph", {}).get("warm")
            got = 1e3 * warm["median"] if warm else None
            add(
                "detect_patches, 0%, in a CUDA graph: under 15 microseconds",
                got,
                warm is not None and got < 15,
            )
        least("hook, every share", hook(None), "published", 30)
        return found
    least("detect_patches, 0%", detect(0.0), "literal", 100)
    least("detect_patches, 10%", detect(0.1), "literal", 3)
    every = [row for row in rows if (row["op"], row["shape"]) == ("detect_patches", _SHAPE)]
    if every:
        most = max(row["versions"]["ours"]["allocated_bytes"] for row in every)
        add("detect_patches, every share: less than 3 MB extra", most / _MB, most < _MOST_EXTRA)
    least("replace_patches_, 10%", _pick(rows, "replace_patches_", PLAIN)(0.1), "reference", 3)
    for share, wanted in ((0.0, 150), (0.1, 15), (1.0, 4 if hardware.has_vnni() else 1.4)):
        least(f"hook, {share:.0%}", hook(share), "published", wanted)
    for case, wanted in (("saeuron, absent", 25), ("saeuron, present", 8)):
        least(f"hook, {case}, as measured", _pick(rows, "hook", case)(None), "published", wanted)
    attached = [row["attach_bytes"] for row in hook(None) if row["attach_bytes"] is not None]
    if attached:
        most = max(attached)
        add("hook: at most 32 MB extra to attach", most / _MB, most <= _MOST_ATTACHED)
    for row in _pick(rows, "hook", "U 137")(0.0):
        add(
            "hook, U 137, 0%: under 0.4 ms",
            row["versions"]["ours"]["own_ms"],
            row["versions"]["ours"]["own_ms"] < 0.4,
        )
    for row in (row for row in rows if (row["op"], row["shape"]) == ("hook", "host")):
        got = 1e3 * row["versions"]["ours"]["own_ms"]
        add("hook, host: under 25 microseconds", got, got < 25)
    return found


def _pick(
    rows: list[dict[str, Any]], op: str, variant: str
) -> Callable[[float | None], list[dict[str, Any]]]:
    """The op's rows at SD 1.5 sizes for one image, by share; None: all."""
    own = [row for row in rows if (row["op"], row["shape"], row["variant"]) == (op, _SHAPE, variant)]
    return lambda share: [row for row in own if share is None or row["share"] == share]
