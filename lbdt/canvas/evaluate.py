"""UA, IRA and CRA of an eraser on EmojiCanvas: ``python -m lbdt.canvas.evaluate``.

Every one of the 20 objects is erased from every object x style prompt (UnlearnCanvas' protocol in miniature: UA is the
share of the erased object's pictures that the classifier no longer calls so, IRA the accuracy on the other objects' and
CRA the style accuracy on all). Each figure is divided by what was really scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench import machine
from . import KINDS, classify, load_eraser, load_pipeline, load_steering
from .generate import GUIDANCE, STEPS, Case, batches, grid, images, judge
from .scenes import OBJECTS, STYLES


def score(
    erased: torch.Tensor, concept: torch.Tensor, style: torch.Tensor, verdict: tuple, base: torch.Tensor
) -> dict:
    """Metrics in percent from int64 [n] tensors: erased concept, true concept and style, verdicts, the base's verdicts."""
    right, right_style = verdict[0] == concept, verdict[1] == style
    target = erased == concept

    def percent(values: torch.Tensor) -> float:
        return 100 * values.float().mean().item()

    per_concept = {
        OBJECTS[c]: {
            "UA": percent(~right[target & (erased == c)]),
            "IRA": percent(right[~target & (erased == c)]),
            "CRA": percent(right_style[erased == c]),
        }
        for c in erased.unique().tolist()
    }
    mean = {m: sum(v[m] for v in per_concept.values()) / len(per_concept) for m in ("UA", "IRA", "CRA")}
    return {
        **mean,
        "base UA": percent(base[target] != concept[target]),
        "unchanged": percent(verdict[0][~target] == base[~target]),
        "images": len(erased),
        "concepts": per_concept,
    }


def evaluate(
    pipe,
    eraser,
    cases: Sequence[Case],
    jobs: Sequence[tuple[int, int]],
    size: int = 60,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> dict:
    """Base accuracy on ``cases`` and the metrics of ``jobs``, pairs of erased concept and index into ``cases``.

    ``eraser``: a ``ConceptEraser`` or a ``Steering``.
    """
    truth = torch.tensor([case.concept for case in cases]), torch.tensor([case.style for case in cases])
    base = judge(pipe, cases, classify, size=size, desc="base", steps=steps, guidance=guidance)
    verdicts = []
    for part in batches(jobs, size, "erased"):
        batch = [cases[i] for _, i in part]
        sets, seeds = [[OBJECTS[c]] for c, _ in part], [case.seed for case in batch]
        with eraser.attach(pipe, concepts=sets, seed=seeds):
            verdicts.append(classify(images(pipe, batch, steps, guidance)))
    index = torch.tensor([i for _, i in jobs])
    erased = torch.tensor([c for c, _ in jobs])
    verdict = torch.cat([v[0] for v in verdicts]), torch.cat([v[1] for v in verdicts])
    return {
        "base object": 100 * (base[0] == truth[0]).float().mean().item(),
        "base style": 100 * (base[1] == truth[1]).float().mean().item(),
        **score(erased, truth[0][index], truth[1][index], verdict, base[0][index]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, default="saeuron", help="which eraser, and its sampling")
    parser.add_argument("--eraser", type=Path, help="an eraser's folder; default: the embedded one of --kind")
    parser.add_argument(
        "--steering", action="store_true", help="the steering baseline of the same folder instead of PER"
    )
    parser.add_argument("--strength", type=float, help="of --steering; default: the folder's")
    parser.add_argument("--pipeline", type=Path, help="a pipeline's folder; default: the embedded one")
    parser.add_argument("--concept", action="append", choices=OBJECTS, help="default: all")
    parser.add_argument("--style", action="append", choices=STYLES, help="default: all")
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--steps", type=int, help="default: the kind's")
    parser.add_argument("--guidance", type=float, help="default: the kind's")
    parser.add_argument(
        "--quick", action="store_true", help="erase from each prompt only its own object and one other"
    )
    parser.add_argument("--padding", type=int)
    parser.add_argument("--source", choices=("random", "nearest", "mean"))
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.steering and (args.padding is not None or args.source):
        parser.error("--padding and --source are of PER, not of --steering")
    from diffusers import StableDiffusionPipeline

    from ..eraser import ConceptEraser
    from ..steering import Steering

    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline) if args.pipeline else load_pipeline()
    if args.steering:
        settings = {} if args.strength is None else {"strength": args.strength}
        eraser = (
            Steering.from_pretrained(args.eraser, **settings)
            if args.eraser
            else load_steering(args.kind, **settings)
        )
    else:
        eraser = ConceptEraser.from_pretrained(args.eraser) if args.eraser else load_eraser(args.kind)
    for name in ("padding", "source"):
        if getattr(args, name) is not None:
            setattr(eraser, name, getattr(args, name))
    styles = [STYLES.index(s) for s in args.style or STYLES]
    cases = [case for case in grid([args.seed]) if case.style in styles]
    concepts = [OBJECTS.index(c) for c in args.concept or OBJECTS]
    jobs = [(c, i) for c in concepts for i in range(len(cases))]
    if args.quick:
        jobs = [(c, i) for c, i in jobs if (c - cases[i].concept) % len(OBJECTS) in (0, 1 + cases[i].style)]
    sampling = KINDS[args.kind]
    steps = sampling.steps if args.steps is None else args.steps
    guidance = sampling.guidance if args.guidance is None else args.guidance
    result = evaluate(pipe, eraser, cases, jobs, steps=steps, guidance=guidance)
    for name, row in result.pop("concepts").items():
        print(f"{name:14s} UA {row['UA']:5.1f}  IRA {row['IRA']:5.1f}  CRA {row['CRA']:5.1f}")
        result.setdefault("per concept", {})[name] = row
    print("  ".join(f"{k} {v:.2f}" for k, v in result.items() if isinstance(v, (int, float))))
    if args.out:
        about = {
            "benchmark": "canvas_evaluate",
            "command": " ".join(["python -m lbdt.canvas.evaluate", *sys.argv[1:]]),
            **machine.describe(torch.device("cpu")),
            "kind": args.kind,
            "method": repr(eraser),
            "seed": args.seed,
            "quick": args.quick,
        }
        args.out.write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
