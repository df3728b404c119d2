"""Fits the artifact judges of EmojiCanvas:
`python -m lbdt.evaluation.worlds.canvas_judges --work DIR [--kind sdxl] [--check]`.

A judge describes unedited generations of one sampling in the style classifier's features: every object in every
style, and in none, from seeds 800,000 to 800,011 (1,680 pictures), which nothing else uses. The pictures are made in
DIR, resumably; the judge is written to `lbdt/canvas/weights/judges`. `--check` prints what it calls artifacts among
pictures whose truth is known, beside a judge in the object classifier's features (needs the emoji font).
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
from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.jobs import Design, Job
from lbdt.evaluation.metrics.feature_distances import FeatureJudge
from lbdt.evaluation.series import Series
from lbdt.evaluation.verdict_columns import Scorers
from lbdt.evaluation.worlds.canvas_world import CanvasJudge, canvas_world, judge_path
from lbdt.runs.processes import Processes, joined_on

SEEDS = range(800_000, 800_012)


def unedited_features(
    world: EvaluatedWorld,
    kind: str,
    seeds: Sequence[int],
    out: Path,
    device: torch.device,
    judge: Judge,
    processes: Processes,
) -> Tensor:
    """float32 [n, F] of every prompt of `seeds` by the sampling of `kind`, in their order; made in `out`,
    resumably."""
    evaluation = Evaluation(
        world=world,
        kinds=[kind],
        design=Design(),
        out=out,
        device=device,
        seeds=tuple(seeds),
        sweep_seeds=(),
        concepts=world.objects,
        processes=processes,
        scorers=Scorers(judge=judge),
    )
    jobs = tuple(Job(prompt) for seed in seeds for prompt in world.prompts(seed))
    how = world.kinds[kind]
    series = Series(f"base-{how.steps}-{how.guidance}/unedited", how, "base", {}, jobs)
    evaluation.make("unedited", [series])
    return evaluation.columns(series).features


def known_pictures(pipe: Any, seed: int = 9_000_000) -> dict[str, list]:
    """120 rendered scenes, and 120 each of what was done to them, through the pipeline's autoencoder before that; PIL
    pictures.

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
    empty = decoded([scenes.landscape(style, seed + i) for i, (_, style) in enumerate(wanted)])
    rng = np.random.default_rng(seed)
    box = slice(scenes.SIDE - scenes.BOX - scenes.GRID, scenes.SIDE - scenes.GRID)
    block = whole.copy()
    block[:, box, 24 : 24 + scenes.BOX] = (255, 0, 255)
    noise = (whole + rng.normal(0, 20, whole.shape)).clip(0, 255).astype(np.uint8)
    shuffled = whole.copy()
    for picture in shuffled:
        tiles = [(y, x) for y in range(2, 7) for x in range(1, 6)]
        cut = [picture[16 * y : 16 * y + 16, 16 * x : 16 * x + 16].copy() for y, x in tiles]
        for (y, x), tile in zip(tiles, rng.permutation(len(cut)), strict=True):
            picture[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = cut[tile]
    sets = {
        "scenes": whole,
        "empty scenes": empty,
        "object's patches shuffled": shuffled,
        "noise of 20 grey levels": noise,
        "channels swapped": whole[..., [1, 2, 0]],
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
            return unedited_features(world, args.kind, SEEDS, args.work, device, look, processes)

        features = features_of(CanvasJudge())
        rival = features_of(CanvasJudge("object")) if args.check else None
        if processes.main:
            path = judge_path(canvas.KINDS[args.kind])
            judge = FeatureJudge.fit(features)
            judge.save(path)
            print(f"{len(features)} pictures -> {path}")
        if args.check and processes.main:
            rivals = [(CanvasJudge(), judge), (CanvasJudge("object"), FeatureJudge.fit(rival))]
            print("| pictures | style classifier's features | object classifier's |\n|---|---|---|")
            for name, pictures in known_pictures(canvas.load_pipeline()).items():
                rates = [100 * fit.artifacts(look(pictures).features).double().mean() for look, fit in rivals]
                print(f"| {name} | {rates[0]:.1f} | {rates[1]:.1f} |")


if __name__ == "__main__":
    main()
