"""A server of many tenants in full, over loopback on this machine: `python -m benchmarks.serving`.

Parts (`--only NAME`): "same": pictures of many tenants together are those of each alone; "overhead": latency and
throughput beside the bare pipeline behind the same server; "malformed", "soak", "reloads", "kills": what goes wrong,
under load. `lbdt.serving`'s README has the figures. tests/serving/test_server.py does it all in small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import serving_load as load
from benchmarks.serving_bare import BareReplica
from lbdt import canvas
from lbdt.bench import hardware
from lbdt.runs.files import json_bytes, write_file
from lbdt.serving.audit_check import verify
from lbdt.serving.server import LocalServer
from lbdt.serving.settings import ServeSettings
from tests.serving import malformed

PORT = 8417
TENANTS = load.tenant_names(200)
CLIENTS = 24
_SEED = 11


class Bench:
    """A server at a time, and what was measured with it."""

    def __init__(self, folder: Path, scale: float) -> None:
        self.folder, self.scale = folder, scale
        self.policy = folder / "policy.toml"
        self.write_policy("1")

    def count(self, whole: int) -> int:
        """`whole`, or less of it where a run is made smaller."""
        return max(8, round(whole * self.scale))

    def write_policy(self, version: str) -> None:
        """A new version, put in place at once."""
        beside = self.policy.with_suffix(".new")
        beside.write_text(load.policy_text(TENANTS, canvas.OBJECTS, version, _SEED))
        beside.replace(self.policy)

    @contextlib.contextmanager
    def server(self, name: str, bare: bool = False, **settings: Any) -> Iterator[LocalServer]:
        """A running server; its audit lies in a folder of that name."""
        from lbdt.serving.deployment import build

        chosen = ServeSettings(
            policy=self.policy,
            audit=self.folder / name,
            batch=8,
            max_queue=512,
            policy_interval=0.2,
            **settings,
        )
        application = (lambda given: build(given, BareReplica)) if bare else build
        server = LocalServer(chosen, port=PORT, application=application)
        try:
            if not load.ready(server.url):
                raise RuntimeError("the server did not become ready")
            yield server
        finally:
            server.stop()

    def state(self, server: LocalServer) -> dict[str, Any]:
        """What `/ready` says."""
        return load.Client(server.url, 30).request("GET", "/ready").body


def same(bench: Bench) -> dict[str, Any]:
    """Every picture of many tenants' requests together against that of its own request alone."""
    asked = load.asks(TENANTS, bench.count(1000), _SEED)
    with bench.server("same", kind="sdxl") as server:
        start = time.perf_counter()
        together = load.together(server.url, asked, CLIENTS)
        seconds = time.perf_counter() - start
        client = load.Client(server.url)
        alone = [client.picture(ask) for ask in _shown(asked, "alone")]
    summary = verify(bench.folder / "same")
    records = {record["request"]: record for record in load.audited(bench.folder / "same")}
    lines = [records.get(reply.body.get("lbdt", {}).get("request")) for reply in together]
    return {
        "requests": len(asked),
        "tenants": len({ask.tenant for ask in asked}),
        "answered by a picture": sum(reply.status == 200 for reply in (*together, *alone)),
        "same bits as alone": sum(
            a.status == b.status == 200 and a.png == b.png for a, b in zip(together, alone, strict=True)
        ),
        "audit lines of the tenant": sum(
            line is not None and line["tenant"] == ask.tenant for line, ask in zip(lines, asked, strict=True)
        ),
        "audit": summary.as_dict()["outcomes"] | {"finished": summary.finished},
        "pictures a second": len(asked) / seconds,
    }


def overhead(bench: Bench) -> dict[str, Any]:
    """Latency and throughput with the eraser and without, in turns; `kind` saeuron, 20 steps."""
    asked = load.asks(TENANTS, bench.count(160), _SEED + 1)
    found: dict[str, list[dict[str, float]]] = {"erased": [], "bare": []}
    for turn in range(3):
        for name in ("erased", "bare") if turn % 2 == 0 else ("bare", "erased"):
            with bench.server(f"overhead-{turn}-{name}", bare=name == "bare") as server:
                load.together(server.url, asked[:16], 16)
                start = time.perf_counter()
                replies = load.together(server.url, asked, 16)
                seconds = time.perf_counter() - start
            if {reply.status for reply in replies} != {200}:
                raise RuntimeError(f"{name}: not every request got a picture")
            latencies = [reply.seconds for reply in replies]
            found[name].append(
                {
                    "p50": load.percentile(latencies, 0.5),
                    "p99": load.percentile(latencies, 0.99),
                    "pictures a second": len(asked) / seconds,
                }
            )
            sys.stderr.write(f"{turn} {name}: {found[name][-1]}\n")
    middle = {
        name: {key: load.percentile([run[key] for run in runs], 0.5) for key in runs[0]}
        for name, runs in found.items()
    }
    slower = {key: 100 * (middle["erased"][key] / middle["bare"][key] - 1) for key in ("p50", "p99")}
    slower["throughput"] = 100 * (
        middle["bare"]["pictures a second"] / middle["erased"]["pictures a second"] - 1
    )
    return {"requests a run": len(asked), "medians of 3 runs": middle, "slower by, %": slower, "runs": found}


def faults(bench: Bench) -> dict[str, Any]:
    """Malformed requests, a long load, new policies under load, killed engines: on one server."""
    found: dict[str, Any] = {}
    asked = load.asks(TENANTS, 4000, _SEED + 2)
    with bench.server("faults", kind="sdxl", threads=1) as server:
        for name, part in (
            ("malformed", _malformed),
            ("soak", _soak),
            ("reloads", _reloads),
            ("kills", _kills),
        ):
            found[name] = part(bench, server, asked)
            sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    summary = verify(bench.folder / "faults")
    found["audit"] = summary.as_dict()["outcomes"] | {
        "finished": summary.finished,
        "pictures": summary.pictures,
    }
    return found


def _malformed(bench: Bench, server: LocalServer, asked: list[load.Ask]) -> dict[str, Any]:
    seeds = [_SEED + 10, _SEED + 11]
    count = bench.count(10_000) // len(seeds)
    load.flood(server.url, malformed.bodies(1, 200), TENANTS[0])
    before = load.memory(os.getpid())
    start = time.perf_counter()
    replies = [
        reply for seed in seeds for reply in load.flood(server.url, malformed.bodies(seed, count), TENANTS[0])
    ]
    seconds = time.perf_counter() - start
    large = load.flood(server.url, [b"x" * 50_000_000] * 4, TENANTS[0], clients=2)
    after = load.memory(os.getpid())
    return {
        "seeds": seeds,
        "requests": len(replies),
        "answered by 4xx in a sentence": sum(400 <= r.status < 500 and len(r.sentence) > 10 for r in replies),
        "a second": len(replies) / seconds,
        "bodies of 50 MB": [reply.status for reply in large],
        "MiB before": before,
        "MiB after": after,
        "ready": load.ready(server.url, 10),
    }


def _soak(bench: Bench, server: LocalServer, asked: list[load.Ask]) -> dict[str, Any]:
    samples: list[tuple[float, dict[str, float]]] = []
    start = time.monotonic()
    with load.Load(server.url, asked, CLIENTS) as running:
        while time.monotonic() - start < 600 * bench.scale:
            time.sleep(10 * min(1.0, bench.scale))
            samples.append(((time.monotonic() - start) / 60, load.memory(os.getpid())))
    statuses = _statuses(running)
    # The first third is warm-up: allocators fill their pools.
    late = samples[len(samples) // 3 :]
    return {
        "minutes": (time.monotonic() - start) / 60,
        "replies": statuses,
        "MiB at the end": samples[-1][1],
        "MiB a minute": {
            name: _slope([(t, m[name]) for t, m in late if name in m]) for name in samples[-1][1]
        },
        "residual MiB": {
            name: _residual([(t, m[name]) for t, m in late if name in m]) for name in samples[-1][1]
        },
    }


def _reloads(bench: Bench, server: LocalServer, asked: list[load.Ask]) -> dict[str, Any]:
    versions = [f"reload-{number}" for number in range(bench.count(50))]
    with load.Load(server.url, asked, CLIENTS) as running:
        for version in versions:
            bench.write_policy(version)
            if not load.until(
                lambda version=version: bench.state(server)["policy"]["version"] == version, 60
            ):
                raise RuntimeError(f"{version} was not taken")
            time.sleep(0.5)
    records = {record["request"]: record for record in load.audited(bench.folder / "faults")}
    concepts: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    right = 0
    for ask, reply in running.replies:
        record = records.get(reply.body.get("lbdt", {}).get("request"))
        if record is not None:
            right += record["policy_version"] == reply.body["lbdt"]["policy"]
            concepts.setdefault((ask.tenant, record["policy_version"]), set()).add(tuple(record["concepts"]))
    return {
        "versions": len(versions),
        "replies": _statuses(running),
        "of the version that the audit says": right,
        "versions in use": len({version for _, version in concepts}),
        "tenants with two sets under one version": sum(len(sets) > 1 for sets in concepts.values()),
    }


def _kills(bench: Bench, server: LocalServer, asked: list[load.Ask]) -> dict[str, Any]:
    draw, count = random.Random(_SEED), max(2, round(10 * bench.scale))
    with load.Load(server.url, asked, CLIENTS) as running:
        for _ in range(count):
            before = len(running.replies)
            if not load.until(lambda b=before: any(r.status == 200 for _, r in running.replies[b:]), 180):
                raise RuntimeError("no picture after a kill")
            time.sleep(draw.uniform(0, 3))
            load.kill_replica(os.getpid(), draw.choice(("Engine", "Engine", "Server")))
        load.until(lambda: running.replies[-1][1].status == 200, 180)
    names = [(record["request"], record["index"]) for record in load.audited(bench.folder / "faults")]
    return {
        "kills": count,
        "replies": _statuses(running),
        "without an answer": sum(reply.status == 0 for _, reply in running.replies),
        "in the audit twice": len(names) - len(set(names)),
    }


def _statuses(running: load.Load) -> dict[str, int]:
    statuses = [reply.status for _, reply in running.replies]
    return {str(status): statuses.count(status) for status in sorted(set(statuses))}


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    n = len(points)
    x, y = sum(t for t, _ in points) / n, sum(m for _, m in points) / n
    spread = sum((t - x) ** 2 for t, _ in points)
    slope = sum((t - x) * (m - y) for t, m in points) / spread if spread else 0.0
    return slope, y - slope * x


def _slope(points: list[tuple[float, float]]) -> float:
    return round(_line(points)[0], 3)


def _residual(points: list[tuple[float, float]]) -> float:
    slope, start = _line(points)
    return round((sum((m - start - slope * t) ** 2 for t, m in points) / len(points)) ** 0.5, 3)


def _shown(items: list[Any], what: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, delay=2, file=sys.stderr))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {"same": same, "overhead": overhead, "faults": faults}


def main() -> None:
    """Runs the parts and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be repeated")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests and minutes")
    parser.add_argument("--out", type=Path, help="the JSON file to write; parts that it has already are kept")
    chosen = parser.parse_args()
    found = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    for name in chosen.only or PARTS:
        with tempfile.TemporaryDirectory(prefix="lbdt-serving-") as folder:
            found[name] = PARTS[name](Bench(Path(folder), chosen.scale))
        found |= {
            "device": hardware.describe(torch.device("cpu"))["device"],
            "command": f"python -m benchmarks.serving --scale {chosen.scale:g}",
        }
        sys.stdout.write(json.dumps({name: found[name]}, indent=2) + "\n")
        if chosen.out:
            write_file(chosen.out, json_bytes(found))


if __name__ == "__main__":
    main()
