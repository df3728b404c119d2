"""Training steps side by side with EleutherAI's sparsify on the same activations: `python -m
benchmarks.train_vs_sparsify --sparsify DIR`.

DIR is where `pip install --no-deps --target DIR eai-sparsify einops natsort simple-parsing docstring-parser` put it.
Each round times one step of each trainer, in turn, so that what else the machine does falls on all. A step is the whole
of it: encoder, top-k, decoder, FVU and AuxK, backward, the decoder's parallel gradient, fused Adam, unit rows, counting
of dead latents; ours also clips the gradient and looks for NaN, which sparsify's trainer does not. sparsify's step is
its own `SparseCoder` with what its trainer does around it; its first losses are compared with ours before anything is
timed.

Why training is not built on a library: sparsify's and SAELens's trainers read language models'
token streams and know no images, timesteps or labels; SAELens and dictionary-learning bring transformer-lens or
nnsight; overcomplete (vision) needs torchvision, timm and OpenCV. None has BatchTopK on sharded maps, the supervised
losses or a resume to the same bits. What they do well is kept: sparsify's file format, its AuxK and its fused-encoder
idea.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.bench import hardware
from lbdt.runs.files import write_file
from lbdt.runs.processes import Processes
from lbdt.sae import SAEConfig
from lbdt.training.objectives import Ranked
from lbdt.training.training_run import TrainingRun

LR = 4e-4


@dataclass(frozen=True)
class Size:
    """Width, latents, k and rows of a step."""

    name: str
    d: int
    latents: int
    k: int
    rows: int


SIZES = (
    Size("sd15", 1280, 20480, 32, 2048),
    Size("canvas x8", 192, 1536, 16, 4096),
    Size("canvas x16", 192, 3072, 32, 4096),
)


class Ours:
    """`lbdt.training`, per-patch TopK."""

    def __init__(self, size: Size, x: Tensor, dead: Tensor, precision: str) -> None:
        from lbdt.training.engine import new_autoencoder

        config = SAEConfig(size.d, size.latents, size.k)
        self.run = TrainingRun(config, Ranked(), precision, Processes(), None)
        self.run.prepare(new_autoencoder(config, 0, None), (x, None), 6.25e-10, False, None)
        self.dead = dead
        self.x = x

    def step(self) -> dict[str, float]:
        """One step, with the same latents dead every time."""
        self.run.idle[:] = torch.where(self.dead, 1 << 40, 0)
        return self.run.step((self.x, None), LR, 1 << 30)


class Sparsify:
    """sparsify's SparseCoder and the work of its trainer around it, with the same starting weights as ours."""

    def __init__(self, size: Size, x: Tensor, dead: Tensor, ours: Ours) -> None:
        config = importlib.import_module("sparsify.config").SparseCoderConfig
        coder = importlib.import_module("sparsify.sparse_coder").SparseCoder
        self.sae = coder(size.d, config(num_latents=size.latents, k=size.k), device=x.device)
        self.sae.load_state_dict(ours.run.sae.state_dict())
        fused = x.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LR, eps=6.25e-10, fused=fused)
        self.x, self.dead = x, dead
        self.idle = torch.zeros(size.latents, dtype=torch.int64, device=x.device)

    def step(self) -> dict[str, float]:
        """One step."""
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        out = sae(self.x, dead_mask=self.dead if bool(self.dead.any()) else None)
        loss = out.fvu + out.auxk_loss / 32
        loss.backward()
        fired = torch.zeros_like(self.dead)
        fired[out.latent_indices.flatten()] = True
        self.idle += self.x.shape[0]
        self.idle[fired] = 0
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"fvu": float(out.fvu.detach()), "auxk": float(out.auxk_loss.detach())}


def load_sparsify(folder: Path) -> None:
    """Makes its modules importable without its trainer, which needs Hugging Face's `datasets`."""
    if not (folder / "sparsify" / "sparse_coder.py").is_file():
        raise ValueError(f"--sparsify {folder}: no sparsify there; see the first lines of this file")
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    sys.path.append(str(folder))
    package = types.ModuleType("sparsify")
    package.__path__ = [str(folder / "sparsify")]
    sys.modules["sparsify"] = package


def measure(size: Size, dead_share: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step of each, and how often ours goes into sparsify's, by rounds in turn.

    Raises:
        ValueError: their first losses differ.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4 * size.d, size.d, generator=generator)
    chosen = torch.randint(len(table), (size.rows, 8), generator=generator)
    x = torch.rand(size.rows, 8, 1, generator=generator).mul(table[chosen]).sum(1).to(device)
    dead = (torch.arange(size.latents) < dead_share * size.latents).to(device)
    ours = Ours(size, x, dead, "float32")
    runners: dict[str, Callable[[], dict[str, float]]] = {
        "ours": ours.step,
        "sparsify": Sparsify(size, x, dead, ours).step,
        "ours, bfloat16": Ours(size, x, dead, "bfloat16").step,
    }
    first = {name: step() for name, step in runners.items()}
    for key in ("fvu", "auxk"):
        gap = abs(first["ours"][key] - first["sparsify"][key])
        if gap > 1e-3 * max(1.0, abs(first["sparsify"][key])):
            raise ValueError(
                f"{size.name}: {key} of the first step is {first['ours'][key]} for ours and "
                f"{first['sparsify'][key]} for sparsify; not the same work, so not timed"
            )
    times: dict[str, list[float]] = {name: [] for name in runners}
    last: dict[str, dict[str, float]] = {}
    for turn in range(rounds):
        order = list(runners)
        for name in order[turn % 3 :] + order[: turn % 3]:
            hardware.synchronize(device)
            start = time.perf_counter()
            last[name] = runners[name]()
            hardware.synchronize(device)
            times[name].append(time.perf_counter() - start)
    ratios = [theirs / mine for mine, theirs in zip(times["ours"], times["sparsify"], strict=True)]
    return {
        "size": vars(size),
        "dead_share": dead_share,
        "rounds": rounds,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "speedup": statistics.median(ratios),
        "speedup_bfloat16": statistics.median(
            theirs / mine for mine, theirs in zip(times["ours, bfloat16"], times["sparsify"], strict=True)
        ),
        "fvu_last_step": {name: values["fvu"] for name, values in last.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes it with --out; exit code 1 where ours is slower anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sparsify", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", action="append", choices=[size.name for size in SIZES], help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", metavar="FILE.json", help="auto: benchmarks/results of the checkout")
    options = parser.parse_args(arguments)
    load_sparsify(options.sparsify)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = [
        measure(size, share, options.rounds, device)
        for size in SIZES
        if not options.size or size.name in options.size
        for share in (0.0, 0.25)
    ]
    print("| size (d, L, k, rows) | dead | ours | sparsify | sparsify / ours | ours, bfloat16 |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        size, seconds = row["size"], row["seconds"]
        print(
            f"| {size['name']} ({size['d']}, {size['latents']}, {size['k']}, {size['rows']}) | "
            f"{row['dead_share']:.0%} | {seconds['ours'] * 1e3:.0f} ms | {seconds['sparsify'] * 1e3:.0f} ms | "
            f"{row['speedup']:.2f} | {seconds['ours, bfloat16'] * 1e3:.0f} ms |"
        )
    if options.out:
        about = hardware.cuda(device) if device.type == "cuda" else hardware.cpu()
        folder = hardware.ROOT / "benchmarks" / "results"
        auto = folder / f"train-vs-sparsify-{hardware.slug(about)}.json"
        result = {
            "benchmark": "train_vs_sparsify",
            "command": " ".join(["python -m benchmarks.train_vs_sparsify", *(arguments or sys.argv[1:])]),
            "sparsify": "eai-sparsify 1.3.3, eager decoder",
            "threads": torch.get_num_threads(),
            "rows": rows,
        } | hardware.describe(device)
        path = auto if options.out == "auto" else Path(options.out)
        write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if all(row["speedup"] >= 1 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
