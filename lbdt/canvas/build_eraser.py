"""Collect activations, train the SAE, score the dictionary and write an eraser: ``python -m lbdt.canvas.build_eraser``.

Stages, each seeded and skipped when its result is there: activations of generated pictures (``--collect``, conditional
half), an SAE and its dictionary for each ``--site``, whose selectivity on pictures of other seeds is printed (the table
of lbdt/canvas/README.md), and with ``--write`` the eraser of the last site.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..dictionary import Calibration, ConceptDictionary, ConceptStatistics, Selection
from ..eraser import ConceptEraser
from ..hooks.lookup import find_block, find_unet
from ..sae import SAEConfig, SparseAutoencoder
from ..training import train
from .generate import Case, batches, grid, images
from .scenes import OBJECTS

COLLECT_SEEDS, SELECTIVITY_SEEDS = range(100, 104), range(200, 201)


class Recorder:
    """Conditional-half outputs and updates of several blocks for every UNet call, float16 on the CPU."""

    def __init__(self, pipe, hookpoints: Sequence[str]) -> None:
        self.values: dict[str, list[torch.Tensor]] = {
            f"{h}:{kind}": [] for h in hookpoints for kind in ("output", "update")
        }
        unet = find_unet(pipe)
        found = [find_block(unet, h) for h in hookpoints]
        self._handles = [
            block.register_forward_hook(self._hook(h)) for h, block in zip(hookpoints, found, strict=True)
        ]

    def _hook(self, hookpoint: str):
        def record(module, args, output):
            x, y = (a[len(a) // 2 :].flatten(2).transpose(1, 2) for a in (args[0], output[0]))
            self.values[f"{hookpoint}:output"].append(y.half())
            self.values[f"{hookpoint}:update"].append((y - x).half())

        return record

    def take(self) -> dict[str, torch.Tensor]:
        """[B, T, N, d] for every site since the last call."""
        out = {site: torch.stack(v, dim=1) for site, v in self.values.items()}
        for v in self.values.values():
            v.clear()
        return out

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def collect(pipe, hookpoints: Sequence[str], cases: Sequence[Case], folder: Path, name: str) -> None:
    """Write ``folder/name-SITE.safetensors``: activations [images, T, N, d], concepts [images], timesteps [T]."""
    if all(
        (folder / f"{name}-{h}:{kind}.safetensors").exists()
        for h in hookpoints
        for kind in ("output", "update")
    ):
        return
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(pipe, hookpoints)
    parts: dict[str, list[torch.Tensor]] = {}
    try:
        with torch.inference_mode():
            for batch in batches(cases, 70, f"collect {name}"):
                images(pipe, batch)
                for site, values in recorder.take().items():
                    parts.setdefault(site, []).append(values)
    finally:
        recorder.remove()
    concepts = torch.tensor([case.concept for case in cases])
    timesteps = pipe.scheduler.timesteps.long().clone()
    for site, values in parts.items():
        path = folder / f"{name}-{site}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({"x": torch.cat(values), "concepts": concepts, "timesteps": timesteps}, partial)
        os.replace(partial, path)


def train_sae(
    data: Path, out: Path, *, expansion: int, k: int, steps: int, update: bool, rows: int = 4096
) -> SparseAutoencoder:
    """TopK SAE on the collected activations; the batch of a step depends on the step only."""
    if (out / "cfg.json").exists():
        return SparseAutoencoder.from_pretrained(out)
    x = load_file(data)["x"].flatten(0, 2)

    def batch(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return x[torch.randint(len(x), (rows,), generator=generator)].float()

    config = SAEConfig(
        d_in=x.shape[1], num_latents=expansion * x.shape[1], k=k, expansion_factor=expansion, update=update
    )
    out.mkdir(parents=True, exist_ok=True)
    sae = train(config, batch, steps, checkpoint=out / "training.ckpt")
    sae.save_pretrained(out)
    return sae


def build_dictionary(sae: SparseAutoencoder, data: Path, candidates: int = 4) -> ConceptDictionary:
    """Scores in one pass over the activations, calibration histograms in a second."""
    tensors = load_file(data)
    x, concepts, timesteps = tensors["x"], tensors["concepts"], tensors["timesteps"]
    statistics = ConceptStatistics(OBJECTS, timesteps, sae.config.num_latents)
    _feed(sae, x, concepts, statistics)
    calibration = Calibration(statistics.build(), candidates=candidates)
    _feed(sae, x, concepts, calibration)
    return calibration.build()


@torch.inference_mode()
def _feed(sae: SparseAutoencoder, x: torch.Tensor, concepts: torch.Tensor, sink) -> None:
    for concept in range(len(OBJECTS)):
        mine = x[concepts == concept]
        for t in range(x.shape[1]):
            sink.add(concept, t, sae.encode(mine[:, t].float()))


def _activations(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """Every latent's activation on patches [..., d]: [..., L]."""
    code = sae.encode(x.float())
    z = torch.zeros(*code.values.shape[:-1], sae.config.num_latents)
    return z.scatter_(-1, code.indices, code.values)


def _detected(z: torch.Tensor, selection: Selection, t: int) -> torch.Tensor:
    """In which patches of bin ``t`` a latent of ``selection`` passes its threshold: bool [...] of z [..., L]."""
    return (z[..., selection.latents] > selection.thresholds[t]).any(-1)


@torch.inference_mode()
def selectivity(sae: SparseAutoencoder, dictionary: ConceptDictionary, data: Path, **select) -> torch.Tensor:
    """Share of patches detected in images [with, without] the concept per bin, mean over concepts: [T, 2]."""
    tensors = load_file(data)
    x, concepts = tensors["x"], tensors["concepts"]
    selections = [dictionary.select(c, **select) for c in OBJECTS]
    rates = torch.zeros(len(OBJECTS), x.shape[1], 2)
    for t in range(x.shape[1]):
        z = _activations(sae, x[:, t])
        for c, selection in enumerate(selections):
            share = _detected(z, selection, t).float().mean(-1)
            rates[c, t, 0], rates[c, t, 1] = share[concepts == c].mean(), share[concepts != c].mean()
    return rates.mean(0)


@torch.inference_mode()
def bank(eraser: ConceptEraser, seen: Path, replaced: Path, size: int = 32) -> torch.Tensor:
    """Embeddings for maps without a donor: ``size`` patches per bin in which their picture's concept is not detected.

    Args:
        eraser: says which patches of the activations in ``seen`` are detected.
        seen, replaced: activations of the same pictures where the SAE looks and where patches are replaced.

    Returns:
        [T, size, d] float32.
    """
    looked, tensors = load_file(seen), load_file(replaced)
    generator = torch.Generator().manual_seed(0)
    selections = [eraser.select(concept) for concept in OBJECTS]
    rows = []
    for t in range(looked["x"].shape[1]):
        clean = []
        for c, selection in enumerate(selections):
            mine = looked["concepts"] == c
            z = _activations(eraser.sae, looked["x"][mine, t])
            clean.append(tensors["x"][mine, t][~_detected(z, selection, t)])
        patches = torch.cat(clean)
        rows.append(patches[torch.randperm(len(patches), generator=generator)[:size]].float())
    return torch.stack(rows)


def main() -> None:
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--collect", action="append", default=[], metavar="HOOKPOINT", help="hookpoints to collect"
    )
    parser.add_argument(
        "--site", action="append", default=[], metavar="HOOKPOINT:output|update", help="train an SAE here"
    )
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the eraser of the last site")
    parser.add_argument(
        "--replace-at", metavar="HOOKPOINT", help="replace patches there; default: at the site"
    )
    parser.add_argument("--target", choices=("output", "update"), default="output", help="what is replaced")
    parser.add_argument("--padding", type=int, default=1)
    parser.add_argument("--source", choices=("random", "nearest", "mean"), default="random")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--false-positive", type=float, default=0.02)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    folder = args.work / "activations"
    if args.collect:
        pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, local_files_only=True)
        collect(pipe, args.collect, grid(COLLECT_SEEDS, plain=True), folder, "train")
        collect(pipe, args.collect, grid(SELECTIVITY_SEEDS), folder, "test")
    for site in args.site:
        out = args.work / f"sae-{site}-x{args.expansion}-k{args.k}-{args.steps}"
        update = site.endswith(":update")
        data = folder / f"train-{site}.safetensors"
        sae = train_sae(data, out, expansion=args.expansion, k=args.k, steps=args.steps, update=update)
        if not (out / "dictionary").exists():
            build_dictionary(sae, data).save_pretrained(out / "dictionary")
        dictionary = ConceptDictionary.from_pretrained(out / "dictionary")
        for label, select in (
            ("published, top 1", {"top_k": 1, "thresholds": "published"}),
            ("calibrated, top 1", {"top_k": 1}),
            ("calibrated, top 2", {"top_k": 2}),
        ):
            rates = selectivity(sae, dictionary, folder / f"test-{site}.safetensors", **select)
            early_to_late = ", ".join(
                f"{on:.2f}/{off:.3f}" for on, off in rates[:: max(1, len(rates) // 5)].tolist()
            )
            print(
                f"| {site} | {label} | {rates[:, 0].mean():.3f} / {rates[:, 1].mean():.4f} | {early_to_late} |",
                flush=True,
            )
    if args.write:
        hookpoint = site.rpartition(":")[0]
        eraser = ConceptEraser(
            sae,
            dictionary,
            args.replace_at or hookpoint,
            padding=args.padding,
            source=args.source,
            selection={"top_k": args.top_k, "false_positive": args.false_positive},
            target=args.target,
            detect_at=hookpoint if args.replace_at else None,
        )
        dictionary.bank = bank(eraser, data, folder / f"train-{eraser.hookpoint}:{args.target}.safetensors")
        eraser.save_pretrained(args.write, dtype=torch.float16)


if __name__ == "__main__":
    main()
