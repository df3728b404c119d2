"""Every object of EmojiCanvas in every style, as it comes and with the object erased:
`python -m benchmarks.contact_sheet [--kind KIND] [--pairs] [--out FILE.png]`.

A row an object, two columns a style: left as it comes, right erased. With `--pairs` every object stands on the left of
another one, and is erased.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lbdt import canvas
from lbdt.canvas.generate import PictureRequest, images, object_requests, pair_requests
from lbdt.cli.erase_picture import save

SEED = 950_000  # nothing else uses it
RESULTS = Path(__file__).resolve().parent / "results"
MARGIN, SIDE = 90, 96


def sheet(requests: list[PictureRequest], base: torch.Tensor, erased: torch.Tensor) -> Image.Image:
    """The pictures [120, 3, 128, 128] of `requests`, by object and style."""
    font = ImageFont.load_default(13)
    page = Image.new(
        "RGB", (MARGIN + 2 * SIDE * len(canvas.STYLES), 20 + SIDE * len(canvas.OBJECTS)), "white"
    )
    draw = ImageDraw.Draw(page)
    for s, style in enumerate(canvas.STYLES):
        draw.text((MARGIN + 2 * SIDE * s, 2), f"{style}: as it comes, erased", "black", font)
    for number, request in enumerate(requests):
        row, column = request.objects[0], request.style
        draw.text((2, 20 + SIDE * row + SIDE // 2), canvas.OBJECTS[row], "black", font)
        for side, pictures in enumerate((base, erased)):
            pixels = ((pictures[number].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.LANCZOS)
            page.paste(small, (MARGIN + SIDE * (2 * column + side), 20 + SIDE * row))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=canvas.KINDS, default="saeuron")
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--eraser", type=Path, help="another eraser's folder")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/erased-KIND[-pairs].png")
    args = parser.parse_args()
    pipe, sampling = canvas.load_pipeline(), canvas.KINDS[args.kind]
    if args.eraser is None:
        eraser = canvas.load_eraser(args.kind)
    else:
        from lbdt import ConceptEraser

        eraser = ConceptEraser.from_pretrained(args.eraser)
    requests = (pair_requests if args.pairs else object_requests)([SEED])
    base, erased = [], []
    for first in range(0, len(requests), 20):
        part = requests[first : first + 20]
        base.append(images(pipe, part, *sampling))
        sets = [[canvas.OBJECTS[request.objects[0]]] for request in part]
        with eraser.attach(pipe, concepts=sets, seed=[request.seed for request in part]):
            erased.append(images(pipe, part, *sampling))
    base, erased = torch.cat(base), torch.cat(erased)
    seen, _ = canvas.classify(erased)
    index = torch.arange(len(requests))
    gone = ~seen[index, torch.tensor([request.objects[0] for request in requests])]
    print(f"the erased object is not seen in {int(gone.sum())} of {len(requests)} pictures")
    if args.pairs:
        kept = seen[index, torch.tensor([request.objects[1] for request in requests])]
        print(f"the other one is seen in {int(kept.sum())}")
    else:
        print(f"nothing is seen in {int((~seen.any(1)).sum())}")
    out = args.out or RESULTS / f"erased-{args.kind}{'-pairs' if args.pairs else ''}.png"
    save(sheet(requests, base, erased), out)
    print(out)


if __name__ == "__main__":
    main()
