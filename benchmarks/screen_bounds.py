"""What the bounds of the int8 screen leave open on feature maps of EmojiCanvas: `python -m benchmarks.screen_bounds`.

The candidates are those of `benchmarks.early_stop`: patches above a threshold of the shipped erasers' concepts, without
an eraser, where the concept is shown and where it is not. Bounds are those of the codes that `lbdt.int8_screen` makes,
with patches coded around the SAE's pre-bias and around zero; behind a pre-encoder there is only zero.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.early_stop import candidates, feature_rows, run
from lbdt import canvas
from lbdt.hooks.pre_encoder import PreEncoder
from lbdt.int8_screen import Screen


def bounds(rows: Tensor, screen: Screen) -> tuple[Tensor, Tensor]:
    """The middles h' and errors e of METHOD.md, 2.7, both [C, L], without what rounding may add, of patches [C, d]."""
    off = rows.double() - screen.centre.double()
    scale = off.abs().amax(1, keepdim=True) / 127
    codes = (off / scale.clamp(min=1e-30)).round()
    unit, start, inner, outer, _, _ = screen.bounds.double()
    h = codes @ screen.codes[:, : rows.shape[1]].double().t() * scale * unit + start
    left = (off - codes * scale).norm(dim=1, keepdim=True)
    return h, left * inner + off.norm(dim=1, keepdim=True) * outer


@torch.inference_mode()
def measure(kind: str, objects: list[str], steps: int | None) -> dict[str, Any]:
    """The share of the candidates, by centre, that bounds leave undecided, the latents between the bounds of one of
    these, and the mean of e in standard deviations of h."""
    pipe, eraser = canvas.load_pipeline(), canvas.load_eraser(kind)
    pipe.set_progress_bar_config(disable=True)
    sae = eraser.sae
    weight, bias, folded = sae.encoder.weight.float(), sae.folded_bias(), sae.folded_pre_encoder()
    middle = {"0": torch.zeros(weight.shape[1])} | ({} if folded else {"b_dec": sae.b_dec.float()})
    screens = {name: Screen.of(weight, bias, centre) for name, centre in middle.items()}
    sums = {name: dict.fromkeys(("undecided", "between", "error", "spread"), 0.0) for name in screens}
    count = 0
    for shown, timestep, patches in feature_rows(pipe, eraser, kind, objects, steps, seed=2):
        looked = PreEncoder(*folded)(patches.t().unsqueeze(0), None)[0].t() if folded else patches
        h = sae.pre_activations(patches)
        for _, found, value, owner in candidates(eraser, shown, timestep, h):
            if len(value) == 0:
                continue
            count += len(value)
            for name, screen in screens.items():
                near, error = bounds(looked[found], screen)
                certain, may = (
                    (near + sign * error > value.unsqueeze(1)).scatter(1, owner.unsqueeze(1), False)
                    for sign in (-1, 1)
                )
                undecided = (certain.sum(1) < sae.rank_k) & (may.sum(1) >= sae.rank_k)
                part = sums[name]
                part["undecided"] += float(undecided.sum())
                part["between"] += float((may & ~certain)[undecided].sum())
                part["error"] += float(error.mean(1).sum())
                part["spread"] += float(h[found].double().std(1).sum())
    result: dict[str, Any] = {"kind": kind, "width": weight.shape[1], "candidates": count, "centres": {}}
    for name, part in sums.items():
        result["centres"][name] = {
            "undecided": part["undecided"] / count,
            "between": part["between"] / max(part["undecided"], 1.0),
            "error": part["error"] / part["spread"],
        }
    return result


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table."""
    table = [
        "| kind | patches coded around | candidates left undecided, % | latents between the bounds of one | e, in "
        "standard deviations of h |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        table += [
            f"| {row['kind']} | {name} | {100 * part['undecided']:.1f} | {part['between']:.0f} | "
            f"{part['error']:.2f} |"
            for name, part in row["centres"].items()
        ]
    return table


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes it with --out."""
    return run("screen_bounds", __doc__, ["Cats", "Trees", "Sea"], measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(main())
