"""Training steps side by side: lbdt's, and those of sparsify's `Trainer.fit`, SAELens' `SAETrainer` and
dictionary_learning's `TopKTrainer`: `python -m benchmarks.train_vs_sparsify --peers DIR`.

DIR is where `pip install --no-deps --target DIR -r benchmarks/peers.txt` put them; benchmarks/peer_trainers.py says
what of each is driven and timed. All get the same activations, starting weights, width, latents, k, rows and dead
latents; first losses are compared before anything is timed. Each round times one step of each trainer, in turn, so that
what else the machine does falls on all.

Ours is the whole of a step of `lbdt train`: the batch looked through for NaN, encoder, TopK, decoder, FVU, AuxK,
backward, gradient norm clipped at 1, the decoder's parallel gradient, fused Adam, unit rows, counting of dead latents.
What theirs are is named in the table. sparsify's own defaults, signum without AuxK, do less than ours where latents are
dead; so "of the same work" leaves out those without AuxK there, and "of all" does not.

Why training is not built on a library: sparsify's and SAELens's trainers read language models'
token streams and know no images, timesteps or labels; SAELens and dictionary-learning bring transformer-lens or
nnsight; overcomplete (vision) needs torchvision, timm and OpenCV. None has BatchTopK on sharded maps, the supervised
losses or a resume to the same bits. What they do well is kept: sparsify's file format, its AuxK and its fused-encoder
idea.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peer_trainers
from benchmarks.peer_trainers import DictionaryLearning, SAELens, Size, Sparsify, Start, Trained
from lbdt.bench import hardware
from lbdt.runs.files import write_file
from lbdt.runs.processes import Processes
from lbdt.sae import SAEConfig
from lbdt.training.engine import ADAM_EPS, new_autoencoder
from lbdt.training.objectives import Ranked
from lbdt.training.training_run import TrainingRun

LR = 4e-4
TARGET = 1.5
"""How many times as fast as the fastest of them a step is meant to be."""
SIZES = (
    Size("sd15", 1280, 20480, 32, 2048),
    Size("canvas x8", 192, 1536, 16, 4096),
    Size("canvas x16", 192, 3072, 32, 4096),
)
OURS = ("lbdt", "lbdt, bfloat16")


class Ours:
    """`lbdt.training`, per-patch TopK."""

    auxk = True

    def __init__(self, start: Start, precision: str) -> None:
        config = SAEConfig(start.size.d, start.size.latents, start.size.k)
        self.run = TrainingRun(config, Ranked(), precision, Processes(), None)
        self.start, self.precision = start, precision
        sae = new_autoencoder(config, 0, None)
        sae.load_state_dict(start.weights)
        self.run.prepare(sae, (start.x, None), ADAM_EPS, True, None)
        self.settings = "Adam fused, AuxK 1/32, clipping, unit rows"

    def _step(self) -> tuple[float, dict[str, float]]:
        self.run.idle[:] = torch.where(self.start.dead, 1 << 40, 0)
        begin = time.perf_counter()
        batch = self.run.fetch(lambda step: self.start.x, 0, self.start.size.rows, None)
        values = self.run.step(batch, LR, 1 << 30)
        return time.perf_counter() - begin, values

    def losses(self) -> dict[str, float]:
        return self._step()[1]

    def step(self) -> float:
        return self._step()[0]


def start_of(size: Size, dead_share: float, device: torch.device) -> Start:
    """Activations that are sums of 8 of 4 d directions, and the weights that `lbdt train` starts from.

    The dead latents' encoder rows are so short that none is among the k largest of a row: dictionary_learning counts
    what fires in a step before it asks what is dead.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4 * size.d, size.d, generator=generator)
    chosen = torch.randint(len(table), (size.rows, 8), generator=generator)
    x = torch.rand(size.rows, 8, 1, generator=generator).mul(table[chosen]).sum(1).to(device)
    dead = (torch.arange(size.latents) < dead_share * size.latents).to(device)
    config = SAEConfig(size.d, size.latents, size.k)
    run = TrainingRun(config, Ranked(), "float32", Processes(), None)
    run.prepare(new_autoencoder(config, 0, None), (x, None), ADAM_EPS, False, None)
    weights = {name: value.detach().clone() for name, value in run.sae.state_dict().items()}
    if dead_share:
        h = (x - weights["b_dec"]) @ weights["encoder.weight"].T
        least = h[:, ~dead].topk(size.k, dim=1).values.min()
        weights["encoder.weight"][dead] *= least / (2 * h[:, dead].max())
    return Start(size, x, dead, weights, LR)


def trainers(start: Start) -> dict[str, Trained]:
    """What is measured, by name."""
    return {
        "lbdt": Ours(start, "float32"),
        "lbdt, bfloat16": Ours(start, "bfloat16"),
        "sparsify": Sparsify(start, "signum", 0.0),
        "sparsify, as lbdt": Sparsify(start, "adam", 1 / 32),
        "SAELens": SAELens(start),
        "SAELens, sparse": SAELens(start, sparse=True),
        "SAELens, autocast": SAELens(start, autocast=True),
        "dictionary_learning": DictionaryLearning(start),
    }


def compare(size: Size, runners: dict[str, Trained]) -> dict[str, dict[str, float]]:
    """The first losses of each.

    Raises:
        ValueError: those of a float32 trainer differ from ours by more than 1e-3, or of a bfloat16 one by 2e-2.
    """
    first = {name: runner.losses() for name, runner in runners.items()}
    for name, found in first.items():
        share = 1e-3 if runners[name].precision == "float32" else 2e-2
        for key in ("fvu", "auxk"):
            wanted = first["lbdt"][key]
            if key in found and not abs(found[key] - wanted) <= share * max(1.0, abs(wanted)):
                raise ValueError(
                    f"{size.name}: {key} of the first step is {wanted} for lbdt and {found[key]} for {name}; not the "
                    "same work, so not timed"
                )
    return {
        name: {key: found[key] for key in ("fvu", "auxk") if key in found} for name, found in first.items()
    }


def measure(size: Size, dead_share: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step of each by rounds in turn, and how often ours goes into the fastest of the others.

    Raises:
        ValueError: their first losses differ.
    """
    runners = trainers(start_of(size, dead_share, device))
    first = compare(size, runners)
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    for turn in range(rounds):
        place = turn % len(order)
        for name in order[place:] + order[:place]:
            times[name].append(runners[name].step())
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peers = [name for name in runners if name not in OURS]
    same = [name for name in peers if runners[name].auxk or not dead_share]
    return {
        "size": vars(size),
        "dead_share": dead_share,
        "rounds": rounds,
        "seconds": seconds,
        "fastest": (least := min(same, key=lambda name: seconds[name])),
        "speedup": ratio(times, least, "lbdt"),
        "speedup_bfloat16": ratio(times, least, "lbdt, bfloat16"),
        "fastest_of_all": (least := min(peers, key=lambda name: seconds[name])),
        "speedup_of_all": ratio(times, least, "lbdt"),
        "first_losses": first,
        "settings": {name: runner.settings for name, runner in runners.items()},
        "stand_in_seconds": runners["sparsify"].stand_in_seconds(),
    }


def ratio(times: dict[str, list[float]], theirs: str, ours: str) -> float:
    """The median over the rounds of one's seconds by the other's."""
    return statistics.median(a / b for a, b in zip(times[theirs], times[ours], strict=True))


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table, what each trainer does, and whether the target is met."""
    names = list(rows[0]["seconds"])
    head = ["d, L, k, rows", "dead", *(f"{name}, ms" for name in names), "fastest peer / lbdt"]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        size = ", ".join(str(row["size"][key]) for key in ("d", "latents", "k", "rows"))
        cells = [size, f"{row['dead_share']:.0%}", *(f"{1e3 * row['seconds'][name]:.0f}" for name in names)]
        cells.append(f"{row['speedup']:.2f}x")
        text.append(f"| {' | '.join(cells)} |")
    text += [f"{name}: {what}" for name, what in rows[0]["settings"].items()]
    for row in rows:
        own = f"{row['size']['name']}, {row['dead_share']:.0%} dead"
        verdict, of_all = ("met" if row[key] >= TARGET else "MISSED" for key in ("speedup", "speedup_of_all"))
        text.append(
            f"{verdict}: {own}: at least {TARGET}x as fast as the fastest of the same work ({row['fastest']}): "
            f"{row['speedup']:.2f}x; in bfloat16 {row['speedup_bfloat16']:.2f}x; of all ({row['fastest_of_all']}): "
            f"{row['speedup_of_all']:.2f}x, {of_all}"
        )
    return text


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes it with --out; exit code 1 where the target is missed anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", action="append", choices=[size.name for size in SIZES], help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="FILE.json", help="auto: benchmarks/results of the checkout")
    options = parser.parse_args(arguments)
    versions = peer_trainers.load(options.peers)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    about = hardware.describe(device)
    rows: list[dict[str, Any]] = []
    for size in sorted(SIZES, key=lambda size: size.latents):
        for share in (0.0, 0.25) if not options.size or size.name in options.size else ():
            rows.append(measure(size, share, options.rounds, device))
            print(f"{size.name}, {share:.0%} dead: done", file=sys.stderr)
    print("\n".join(lines(rows)))
    if options.out:
        name = f"train-vs-sparsify-{hardware.slug(about['device'])}.json"
        auto = hardware.ROOT / "benchmarks" / "results" / name
        given = ["DIR" if each == str(options.peers) else each for each in arguments or sys.argv[1:]]
        result = {
            "benchmark": "train_vs_sparsify",
            "command": " ".join(["python -m benchmarks.train_vs_sparsify", *given]),
            "peers": versions,
            "target": TARGET,
            "rows": rows,
        } | about
        path = auto if options.out == "auto" else Path(options.out)
        write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if all(row["speedup"] >= TARGET for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
