"""The first picture of README.md: `python -m benchmarks.first_picture [--kind KIND] [--seed N] [--out FILE.png]`.

A dog and a cat in three styles, the cats erased: what `lbdt erase` draws, one below the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from lbdt import canvas
from lbdt.cli.erase_picture import compose, save

OUT = Path(__file__).resolve().parent / "results/erase.png"
STYLES = ("Photo", "Neon", "Sketch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=canvas.KINDS, default="saeuron")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    pipe, eraser, sampling = canvas.load_pipeline(), canvas.load_eraser(args.kind), canvas.KINDS[args.kind]
    pipe.set_progress_bar_config(disable=True)

    def picture(style: str) -> Image.Image:
        return pipe(
            canvas.prompt(("Dogs", "Cats"), style),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]

    rows = []
    for style in STYLES:
        before = picture(style)
        with eraser.attach(pipe, ["Cats"], seed=args.seed, keep_masks=True) as attached:
            after = picture(style)
        captions = (f"a dog and a cat, {style}", "patches of Cats", "Cats erased")
        rows.append(compose(before, attached.masks(), after, captions))
    page = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        page.paste(row, (0, number * rows[0].height))
    save(page, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
