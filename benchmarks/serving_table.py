"""What the README says of the results of `benchmarks.serving`: `python -m benchmarks.serving_table FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROCESSES = {"Engine": "engine", "Server": "routes", "ProxyActor": "proxy"}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [*_same(found["same"]), *_overhead(found["overhead"]), *_faults(found["faults"])]
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {said} |" for what, said in rows)])


def _same(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        f"{part['requests']:,} requests of {part['tenants']} tenants together, then each alone (kind sdxl, 4 steps)",
        f"same bits: {part['same bits as alone']:,}; with a line of their tenant in the audit, which is valid: "
        f"{part['audit lines of the tenant']:,}",
    )


def _overhead(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    erased, bare = (part["medians of 3 runs"][name] for name in ("erased", "bare"))
    slower = part["slower by, %"]
    for key, name, unit in (
        ("p50", "latency, p50", "s"),
        ("p99", "latency, p99", "s"),
        ("pictures a second", "throughput", "a second"),
    ):
        percent = slower[key if key in slower else "throughput"]
        yield f"{name}: erasing, bare", f"{erased[key]:.3g}, {bare[key]:.3g} {unit}: {percent:+.1f} % slower"


def _faults(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    wrong, soak, reloads, kills = (part[name] for name in ("malformed", "soak", "reloads", "kills"))
    held = (
        f"{said} {wrong['MiB before'][n]:.0f} to {wrong['MiB after'][n]:.0f}"
        for n, said in _PROCESSES.items()
    )
    yield (
        f"{wrong['requests']:,} malformed requests (seeds {', '.join(map(str, wrong['seeds']))})",
        f"4xx with a sentence: {wrong['answered by 4xx in a sentence']:,}; MiB: {', '.join(held)}",
    )
    grown = (
        f"{said} {soak['MiB a minute'][n]:+.2f} (scatter {soak['residual MiB'][n]:.1f})"
        for n, said in _PROCESSES.items()
    )
    yield (
        f"{soak['minutes']:.0f} minutes of load",
        f"{_pictures(soak)} pictures, {_errors(soak)} errors; MiB a minute: {', '.join(grown)}",
    )
    yield (
        f"{reloads['versions']} versions of the policy under load",
        f"{_pictures(reloads)} pictures of {reloads['versions in use']} versions, {_errors(reloads)} errors; by the "
        f"version that the audit names: {reloads['of the version that the audit says']:,}",
    )
    yield (
        f"`kill -9` of a replica under load, {kills['kills']} times",
        f"{_pictures(kills)} pictures, {_errors(kills)} errors; without an answer: {kills['without an answer']}, twice "
        f"in the audit: {kills['in the audit twice']}",
    )


def _pictures(part: dict[str, Any]) -> str:
    return f"{part['replies'].get('200', 0):,}"


def _errors(part: dict[str, Any]) -> str:
    return f"{sum(count for status, count in part['replies'].items() if status not in ('200', '0')):,}"


def main() -> None:
    """Prints the table of a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    sys.stdout.write(table(json.loads(parser.parse_args().file.read_text())) + "\n")


if __name__ == "__main__":
    main()
