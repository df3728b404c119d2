"""Fits the artifact judges of EmojiCanvas:
`python -m lbdt.evaluation.worlds.canvas_judges --work DIR [--kind sdxl] [--check]`.

A judge describes unedited generations of one sampling along the weights of the fault classifier: every object in every
style, and in none, pairs likewise, and empty scenes, from seeds 800,000 to 800,002 (945 pictures), which nothing else
uses.
The pictures are made in DIR, resumably; the judge is written to `lbdt/canvas/weights/judges`. `--check` prints what it
calls artifacts among pictures whose truth is known, beside judges in the style and in the object classifier's features
(needs the emoji font).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt import canvas
from lbdt.activations.prompts import Prompt
from lbdt.canvas.defaults import labelled
from lbdt.canvas.generate import empty_requests, object_requests, pair_requests
from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.jobs import Design, Job
from lbdt.evaluation.metrics.feature_distances import DirectionJudge, FeatureJudge
from lbdt.evaluation.series import Series
from lbdt.evaluation.verdict_columns import Scorers
from lbdt.evaluation.worlds.canvas_world import CanvasJudge, canvas_world, judge_path
from lbdt.runs.processes import Processes, joined_on

SEEDS = range(800_000, 800_003)


def unedited_features(
    world: EvaluatedWorld,
    kind: str,
    prompts: Sequence[Prompt],
    out: Path,
    device: torch.device,
    judge: Judge,
    processes: Processes,
) -> Tensor:
    """float32 [n, F] of every one of `prompts` by the sampling of `kind`, in their order; made in `out`, resumably."""
    evaluation = Evaluation(
        world=world,
        kinds=[kind],
        design=Design(),
        out=out,
        device=device,
        seeds=world.seeds,
        sweep_seeds=(),
        concepts=world.objects,
        processes=processes,
        scorers=Scorers(judge=judge),
    )
    jobs = tuple(map(Job, prompts))
    how = world.kinds[kind]
    series = Series(f"base-{how.steps}-{how.guidance}/unedited", how, "base", {}, jobs)
    evaluation.make("unedited", [series])
    return evaluation.columns(series).features


def unedited_prompts(seeds: Sequence[int]) -> list[Prompt]:
    """A seed's 140 prompts of one object, 140 of pairs and 35 of none, for every seed."""
    asked = [*object_requests(seeds, plain=True), *pair_requests(seeds, plain=True)]
    return [labelled(request) for request in [*asked, *empty_requests(seeds, plain=True, each=5)]]


def known_pictures(pipe: Any, seed: int = 9_000_000) -> dict[str, list]:
    """120 rendered scenes of one object, pairs and empty ones, and what was done to the first, through the pipeline's
    autoencoder before that; PIL pictures.

    "empty" scenes are what a clean erasure leaves: the landscape in its style, without an object.
    """
    import numpy as np
    from PIL import Image

    from lbdt.canvas import scenes

    def decoded(pictures: Sequence[Image.Image]) -> np.ndarray:
        with torch.inference_mode():
            out = pipe.vae.decode(pipe.vae.encode(canvas.as_tensor(pictures)).latents).sample
        return ((out.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    wanted = [(name, style) for name in scenes.OBJECTS for style in scenes.STYLES]
    whole = decoded([scenes.render(*what, seed + i) for i, what in enumerate(wanted)])
    others = [*scenes.OBJECTS[1:], scenes.OBJECTS[0]]
    pairs = decoded(
        [scenes.render((name, others[i // 6]), style, seed + i) for i, (name, style) in enumerate(wanted)]
    )
    empty = decoded([scenes.render((), style, seed + i) for i, (_, style) in enumerate(wanted)])
    rng = np.random.default_rng(seed)
    rows = slice(scenes.FLOOR - scenes.BOX, scenes.FLOOR)
    block = whole.copy()
    block[:, rows, 40 : 40 + scenes.BOX] = (255, 0, 255)
    noise = (whole + rng.normal(0, 20, whole.shape)).clip(0, 255).astype(np.uint8)
    shuffled = whole.copy()
    for picture in shuffled:
        tiles = [(y, x) for y in range(2, 7) for x in range(8)]
        cut = [picture[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].copy() for y, x in tiles]
        for (y, x), tile in zip(tiles, rng.permutation(len(cut)), strict=True):
            picture[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = cut[tile]
    coloured = [i for i, (_, style) in enumerate(wanted) if style != "Sketch"]
    sets = {
        "scenes of one object": whole,
        "pairs": pairs,
        **{f"empty, {style}": empty[i::6] for i, style in enumerate(scenes.STYLES)},
        "patches shuffled": shuffled,
        "noise of 20 grey levels": noise,
        "channels swapped (Sketch has no colours)": whole[coloured][..., [1, 2, 0]],
        "magenta block": block,
    }
    return {name: [Image.fromarray(picture) for picture in pictures] for name, pictures in sets.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the pictures are made, and kept")
    parser.add_argument("--kind", choices=canvas.KINDS, default="saeuron", help="whose sampling")
    parser.add_argument("--check", action="store_true", help="print its verdicts on pictures of known truth")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as `lbdt evaluate`, whose pictures it judges
    with joined_on("cpu") as (processes, device):
        world = replace(canvas_world(), reference=None)  # it is what is being made

        def features_of(look: CanvasJudge) -> Tensor:
            return unedited_features(
                world, args.kind, unedited_prompts(SEEDS), args.work, device, look, processes
            )

        looks = [CanvasJudge(name) for name in ("fault", "style", "object")[: 3 if args.check else 1]]
        found = [features_of(look) for look in looks]
        if processes.main:
            direction = canvas.classifiers()["fault"].head.weight.detach()[0]
            fits = {
                "along the fault classifier's weights": (looks[0], DirectionJudge.fit(found[0], direction))
            }
            fits |= {
                f"{look.features_name.split()[1]} features": (look, FeatureJudge.fit(features))
                for look, features in zip(looks, found, strict=True)
            }
            path = judge_path(canvas.KINDS[args.kind])
            next(iter(fits.values()))[1].save(path)
            print(f"{len(found[0])} pictures -> {path}")
        if args.check and processes.main:
            print(f"| pictures | {' | '.join(fits)} |")
            print("|---" * (1 + len(fits)) + "|")
            for name, pictures in known_pictures(canvas.load_pipeline()).items():
                rates = [
                    100 * fit.artifacts(look(pictures).features).double().mean()
                    for look, fit in fits.values()
                ]
                print(f"| {name} | {' | '.join(f'{rate:.1f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
