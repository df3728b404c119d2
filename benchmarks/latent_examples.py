"""Makes the examples that ship with EmojiCanvas's erasers (`lbdt/app/example_files.py`), a sampling at a time.

    python -m benchmarks.latent_examples                     # into lbdt/canvas/weights/examples, what is not there yet
    python -m benchmarks.latent_examples --again --out DIR   # all of them anew

Every object in every style from two seeds that nothing was trained, scored or evaluated on: 240 pictures for each
sampling, unedited. Erasers of one sampling look at the same pictures: 7 minutes on two busy CPU cores for the four
of 20 steps, one for that of 4. What was killed goes on with the sampling that it was at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lbdt import canvas
from lbdt.app.example_files import FOLDER, sheet_name, write_firings, write_sheet
from lbdt.app.examples import look
from lbdt.canvas.defaults import labelled
from lbdt.canvas.generate import object_requests

SEEDS = (910_000, 910_001)
BATCH = 20


def main(arguments: list[str] | None = None) -> None:
    """Makes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: the package's")
    parser.add_argument("--again", action="store_true", help="make what is there anew")
    args = parser.parse_args(arguments)
    for sampling in dict.fromkeys(canvas.KINDS.values()):
        kinds = [kind for kind, own in canvas.KINDS.items() if own == sampling]
        names = [f"{kind}.safetensors" for kind in kinds] + [sheet_name(sampling)]
        if not args.again and all((args.out / name).is_file() for name in names):
            continue
        make(args.out, sampling, kinds)


def make(folder: Path, sampling: canvas.Sampling, kinds: list[str]) -> None:
    """The sheet of a sampling, and the firings of its kinds of eraser."""
    pipe, erasers = canvas.load_pipeline(), [canvas.load_eraser(kind) for kind in kinds]
    prompts = [labelled(request) for request in object_requests(SEEDS)]
    looked = [(eraser, range(eraser.sae.config.num_latents)) for eraser in erasers]
    pictures = {}
    sets = look(
        pipe,
        looked,
        prompts,
        steps=sampling.steps,
        guidance=sampling.guidance,
        told=lambda done: sys.stderr.write(f"{', '.join(kinds)}: {done.done} of {done.of} pictures\n"),
        batch=BATCH,
    )
    for each in sets:
        pictures |= each.pictures
    # The few pictures that no latent has among its strongest are left black.
    first = next(iter(pictures.values()))
    blank = first.point(lambda _: 0)
    write_sheet(folder, sampling, prompts, [pictures.get(number, blank) for number in range(len(prompts))])
    for kind, eraser, found in zip(kinds, erasers, sets, strict=True):
        write_firings(folder, kind, eraser, found)


if __name__ == "__main__":
    main()
