"""How many patches are candidates where a concept is shown and where it is not, and how much of the dictionary it takes
to refute one, by the order in which latents are read: `python -m benchmarks.early_stop`.

Feature maps come from EmojiCanvas without an eraser; candidates are the patches above a threshold of the shipped
erasers' concepts. A candidate is refuted once k other latents exceed its value, and the count stops there. The
dictionary's counts are of other pictures than it is judged on. `lbdt bench` draws its measured cases from the shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt import canvas
from lbdt.bench import hardware
from lbdt.editors import ConceptEraser
from lbdt.runs.files import write_file

STYLES = ("Photo", "Sketch", "Neon")
_FURTHER = (0, 5, 10, 15)
TENTHS = tuple(0.05 + 0.1 * tenth for tenth in range(10))
"""The middles of ten equal groups of refuted candidates, by how much is read of the dictionary."""


def feature_rows(
    pipe: Any, eraser: ConceptEraser, kind: str, objects: list[str], steps: int | None, seed: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(object, timestep, patches [B * N, d]) of every UNet call on the prompts of these objects in three styles."""
    block = pipe.unet.get_submodule(eraser.hookpoint.removeprefix("unet."))
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, given, output: seen.append(output[0] - given[0]))
    try:
        for name in objects:
            seen.clear()
            prompts = [canvas.prompt(name, style) for style in STYLES]
            pipe(
                prompts,
                num_inference_steps=steps or canvas.KINDS[kind].steps,
                guidance_scale=canvas.KINDS[kind].guidance,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            )
            for timestep, x in zip(pipe.scheduler.timesteps, seen, strict=True):
                yield name, timestep, x.flatten(2).transpose(1, 2).flatten(0, 1)
    finally:
        handle.remove()


def candidates(
    eraser: ConceptEraser, shown: str, timestep: Tensor, h: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(concept, found [B * N], value [C], owner [C]) of the candidates, which are `found` among the rows of `h`, of the
    concept that is shown, and of three others."""
    place, names = int(eraser.dictionary.nearest_bin(timestep.view(1))), eraser.concepts
    first = names.index(shown)
    for concept in (names[(first + further) % len(names)] for further in _FURTHER):
        selection = eraser.select(concept)
        limits = eraser.sae.to_pre_activation(selection.thresholds, selection.latents)[place]
        own = h[:, selection.latents]
        value, owner = torch.where(own > limits, own, -torch.inf).max(dim=1)
        found = value > -torch.inf
        yield concept, found, value[found], selection.latents[owner[found]]


@torch.inference_mode()
def measure(kind: str, objects: list[str], steps: int | None) -> dict[str, Any]:
    """Shares of candidates and detections, and latents read until a refuted candidate is known to be one, by order."""
    pipe, eraser = canvas.load_pipeline(), canvas.load_eraser(kind)
    pipe.set_progress_bar_config(disable=True)
    k, total = eraser.sae.rank_k, eraser.sae.config.num_latents
    orders = {
        "as the SAE numbers them": torch.arange(total),
        "by mean activation": eraser.dictionary.replaced(fired=None).firing_order(),
        "by firing counts (the shipped dictionary)": eraser.dictionary.firing_order(),
    }
    counts = {name: {"patches": 0, "candidates": 0, "detected": 0} for name in ("present", "absent")}
    read: dict[str, dict[str, list[Tensor]]] = {name: {order: [] for order in orders} for name in counts}
    for shown, timestep, patches in feature_rows(pipe, eraser, kind, objects, steps, seed=2):
        h = eraser.sae.pre_activations(patches)
        for concept, found, value, owner in candidates(eraser, shown, timestep, h):
            rows = h[found]
            name = "present" if concept == shown else "absent"
            above = (rows > value.unsqueeze(1)).scatter(1, owner.unsqueeze(1), False)
            full = above.sum(dim=1) >= k
            for key, count in (
                ("patches", len(h)),
                ("candidates", len(rows)),
                ("detected", int((~full).sum())),
            ):
                counts[name][key] += count
            for order, places in orders.items():
                # The k-th latent above the value ends the count.
                read[name][order].append((above[full][:, places].cumsum(dim=1) >= k).int().argmax(dim=1) + 1)
    result: dict[str, Any] = {"kind": kind, "k": k, "latents": total}
    for name, found in counts.items():
        depths = {order: torch.cat(parts).double() for order, parts in read[name].items()}
        own = depths["as the SAE numbers them"]
        result[name] = found | {
            "mean_read": {
                order: float(depth.mean()) if len(depth) else 0.0 for order, depth in depths.items()
            },
            "read_tenths": torch.quantile(own, torch.tensor(TENTHS).double()).tolist() if len(own) else [],
        }
    return result


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    table = [
        "| kind | concept | candidates, % | detected, % | latents read of a refuted one | in the order of means "
        "| of firing counts | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name in ("present", "absent"):
            part = row[name]
            shares = (100 * part[key] / part["patches"] for key in ("candidates", "detected"))
            read = " | ".join(f"{mean:.0f}" for mean in part["mean_read"].values())
            table.append(
                f"| {row['kind']} | {name} | {' | '.join(f'{share:.1f}' for share in shares)} | {read} | "
                f"{row['latents']:,} |"
            )
    return table


def run(
    name: str,
    about: str,
    objects: list[str],
    measure: Callable[[str, list[str], int | None], dict[str, Any]],
    lines: Callable[[list[dict[str, Any]]], list[str]],
    arguments: list[str] | None,
) -> int:
    """The command line of a benchmark by kinds of erasers and `objects`, unless others are named: prints the table of
    what is measured of each kind; writes it with --out."""
    parser = argparse.ArgumentParser(description=about.partition("\n\n")[0])
    parser.add_argument("--kind", action="append", choices=list(canvas.KINDS), help="default: all")
    parser.add_argument("--steps", type=int, help="default: the kind's own")
    parser.add_argument(
        "--object",
        action="append",
        choices=canvas.OBJECTS,
        metavar="NAME",
        help=f"default: {', '.join(objects)}",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    objects = options.object or objects
    rows = [measure(kind, objects, options.steps) for kind in options.kind or canvas.KINDS]
    result = {"benchmark": name, "objects": objects, "steps": options.steps, "kinds": rows}
    print("\n".join(lines(rows)))
    if options.out:
        device = hardware.describe(torch.device("cpu"))
        write_file(options.out, (json.dumps(result | device, indent=1) + "\n").encode())
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes it with --out."""
    return run("early_stop", __doc__, ["Cats", "Dogs", "Trees", "Sea", "Human"], measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(main())
