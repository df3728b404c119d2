"""`detect_patches` against the literal version, side by side on this CPU: `python -m benchmarks.detect_vs_literal`.

The literal version encodes every patch, takes the top-k, scatters it into zeros [B, N, L] and compares. Both are
timed in turn in the same process; a case whose masks differ ends the run before any time is shown. Writes
benchmarks/results/cpu-<model>.json (not with --quick, which runs small sizes; --out names another file).
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine, shapes
from lbdt import ops

RESULTS = Path(__file__).parent / "results"
MB = 1e6


class Case(NamedTuple):
    """A share of patches above the threshold, and whether these are among the k largest too."""

    share: float
    inside: bool = True
    least_ratio: float | None = None  # target, at full size

    @property
    def name(self) -> str:
        return f"{self.share:.0%} pass" + ("" if self.inside or not self.share else ", none in the first k")


CASES = (
    Case(0.0, least_ratio=100.0),
    Case(0.1, least_ratio=3.0),
    Case(0.5),
    Case(1.0),
    Case(0.1, inside=False),
    Case(1.0, inside=False),
)
MOST_EXTRA = 32 * MB  # target for every case, at full size


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where a mask differs from the literal version's."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = (shapes.QUICK if options.quick else shapes.SD15)._replace(
        **({"union": options.union} if options.union else {})
    )
    about = machine.describe()
    limits = _limits(shape, 32 if options.quick else 512)
    cases = []
    for case in CASES:
        result = measure(shape, case, options.rounds or (5 if options.quick else 15), limits)
        if not result["masks_equal"]:
            print(f"{case.name}: the masks differ, so no time is shown", file=sys.stderr)
            return 1
        cases.append(result)
    result = {
        "benchmark": "detect_vs_literal",
        "command": shlex.join(
            [
                "python",
                "-m",
                "benchmarks.detect_vs_literal",
                *(arguments if arguments is not None else sys.argv[1:]),
            ]
        ),
        **about,
        "dtype": "float32",
        "sizes": shape._asdict(),
        "limits": limits,
        "cases": cases,
        "targets": None if options.quick else _targets(cases),
    }
    print("\n".join(table(result)))
    out = options.out or (None if options.quick else RESULTS / f"cpu-{machine.slug(about['device'])}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
    return 0


@torch.inference_mode()
def measure(shape: shapes.Shape, case: Case, rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    """Times, peak memory and floor of one case; times are left out where the masks differ."""
    arguments = shapes.detection(shape, case.share, case.inside)
    ours, theirs = partial(ops.detect_patches, **arguments), partial(shapes.literal, **arguments)
    mask = ours()
    result: dict[str, Any] = {
        "case": case.name,
        "above_threshold": round(case.share * shape.patches),
        "detected": int(mask.sum()),
        "masks_equal": torch.equal(mask, theirs()),
        "backend": ops.explain("detect_patches", *arguments.values()).backend,
    }
    if not result["masks_equal"]:
        return result
    for name, function in (("ours", ours), ("literal", theirs)):
        result[name] = {
            "allocated_bytes": machine.allocated_peak(function),
            "resident_bytes": machine.resident_peak(function),
        }
    repeats = max(1, int(0.02 / _seconds(ours, 1)))
    times: dict[str, list[float]] = {"ours": [], "literal": []}
    for _ in range(rounds):
        times["literal"].append(_seconds(theirs, 1))
        # The literal version has just been through the caches, as the denoiser's blocks would have.
        times["ours"].append(_seconds(ours, repeats))
    for name, values in times.items():
        result[name] |= {"rounds": rounds, "ms": _milliseconds(values)}
    result["ours"]["repeats"] = repeats
    result["ratio"] = result["literal"]["ms"]["median"] / result["ours"]["ms"]["median"]
    result["floor"] = _floor(shape, result["above_threshold"] if case.inside else 0, limits)
    result["times_the_floor"] = result["ours"]["ms"]["median"] / result["floor"]["ms"]
    return result


def table(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    device, limits = result["device"]["name"], result["limits"]
    lines = [
        f"{device}, {result['threads']} threads, load {result['load_average_before']} before; torch "
        f"{result['versions']['torch']}; commit {result['commit'][:7]}{' + changes' if result['dirty'] else ''}",
        ", ".join(f"{name} {value}" for name, value in result["sizes"].items()) + "; float32",
        f"measured: {limits['bytes_per_second'] / 1e9:.1f} GB/s read, "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s product",
        "",
        "| case | detected | literal ms (p20-p80) | ours ms (p20-p80) | ratio | floor ms | x floor "
        "| literal MB (RSS) | ours MB (RSS) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        cells = [case["case"], str(case["detected"])]
        for name in ("literal", "ours"):
            ms = case[name]["ms"]
            cells.append(f"{ms['median']:.4g} ({ms['p20']:.4g}-{ms['p80']:.4g})")
        cells += [
            f"{case['ratio']:.1f}",
            f"{case['floor']['ms']:.3g} ({case['floor']['bound']})",
            f"{case['times_the_floor']:.1f}",
        ]
        for name in ("literal", "ours"):
            resident = case[name]["resident_bytes"]
            cells.append(
                f"{case[name]['allocated_bytes'] / MB:.1f} ({'?' if resident is None else f'{resident / MB:.1f}'})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    for target in result["targets"] or []:
        lines.append(f"{'met' if target['met'] else 'MISSED'}: {target['target']}, got {target['got']:.1f}")
    return lines


def _targets(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    targets = []
    for case, result in zip(CASES, cases, strict=True):
        if case.least_ratio is not None:
            met = result["ratio"] >= case.least_ratio
            wanted = f"{case.name}: at least {case.least_ratio:.0f} times as fast"
            targets.append({"target": wanted, "got": result["ratio"], "met": met})
    most = max(result["ours"]["allocated_bytes"] for result in cases)
    wanted = f"less than {MOST_EXTRA / MB:.0f} MB extra in every case"
    return [*targets, {"target": wanted, "got": most / MB, "met": most < MOST_EXTRA}]


def _limits(shape: shapes.Shape, megabytes: int) -> dict[str, float]:
    return {
        "bytes_per_second": machine.read_bandwidth(megabytes),
        "bandwidth_buffer_mb": megabytes,
        "flops_per_second": machine.gemm_rate(shape.patches, shape.width, shape.latents),
    }


def _floor(shape: shapes.Shape, counted: int, limits: dict[str, float]) -> dict[str, Any]:
    """The least time for reading x and the own rows and multiplying them; and, for `counted` patches that must be
    ranked among all latents, for the whole dictionary. `x` may come from a cache, so less is possible."""
    size = 4 * (shape.patches * shape.width + shape.union * shape.width)
    flops = 2 * shape.patches * shape.union * shape.width
    if counted:
        size += 4 * shape.latents * shape.width
        flops += 2 * counted * shape.latents * shape.width
    parts = {"memory": size / limits["bytes_per_second"], "product": flops / limits["flops_per_second"]}
    bound = max(parts, key=parts.get)
    return {"bytes": size, "flops": flops, "ms": 1e3 * parts[bound], "bound": bound}


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    values = sorted(1e3 * s for s in seconds)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {
        "median": statistics.median(values),
        "p20": fifths[0],
        "p80": fifths[3],
        "least": values[0],
        "most": values[-1],
    }


def _seconds(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect_vs_literal", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, a second or two, no targets")
    parser.add_argument("--rounds", type=int, help="timed rounds per case, at least 2 (default 15, quick 5)")
    parser.add_argument("--union", type=int, metavar="U", help="watched latents (default 2)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 2:
        parser.error("--rounds: expected at least 2")
    return options


if __name__ == "__main__":
    sys.exit(main())
