"""The launches of `erase_step` that are its own, without those of other ops between them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lbdt import call_rows, reference
from lbdt.kernels.erase_step import keep_run, rows_of_call


def step_rows(
    run_sums: Tensor | None, run_last: Tensor, run_count: Tensor, cond: int, images: int, **given
) -> tuple:
    """What the first launch says, and keeps of the run what it begins with."""
    run = None if run_sums is None else (run_sums, run_last, run_count)
    rows = rows_of_call(run=run, cond=cond, images=images, gated=run is not None, **given)
    if run is not None:
        keep_run(rows.so_far, rows.kept, run, len(rows.now) if cond < 0 else images)
    return tuple(tensor for tensor in rows if tensor is not None)


def expected(given: dict) -> tuple:
    """The same by `lbdt.call_rows` and the ops' references."""
    x, timesteps, images, cond = (given[name] for name in ("x", "timesteps", "images", "cond"))
    image, half = call_rows.images_of(len(x), images, x.device)
    now, inside = timesteps.float(), torch.ones(len(x), dtype=torch.bool)
    if given["schedule"] is not None:
        inside = call_rows.in_window(now, given["schedule"], (given["first"], given["last"]))
    counted = ((given["counted"] >> half.clamp(max=63)) & 1).bool()
    on = call_rows.sets_of(given["enabled"], image, images) & (inside & counted).unsqueeze(1)
    u = reference.patch_uniform(
        call_rows.seeds_of(given["seeds"], image, images), timesteps, half, x.shape[2:].numel()
    )
    finite = x.isfinite() if given["minus"] is None else x.isfinite() & given["minus"].isfinite()
    sums = torch.where(finite.flatten(2).all(1), 0.0, torch.nan)
    found = [call_rows.nearest(now, given["times"]), now, on, u, sums]
    if given["run_sums"] is not None:
        counting = len(x) if cond < 0 else images
        memory = given["run_sums"][:counting], given["run_last"][:counting], given["run_count"]
        if cond >= 0:
            found.append(image + cond * images)
        found.append(call_rows.begin_call(*memory, now, inside, given["whole_calls"]))
        found.append(now.masked_fill(~inside, -torch.inf))
    return tuple(found)


def inputs(run: bool = False, update: bool = False, of: Callable = lambda x: x, **given) -> dict:
    """Arguments of `step_rows`. `of`: what is made of the feature maps."""
    g = torch.Generator().manual_seed(3)
    x, minus = torch.randint(-3, 4, (2, 4, 300, 5, 7), generator=g).half()
    x[0, 299, 1, 2], x[3, 0, 4, 6], minus[1, 130, 0, 0] = torch.nan, torch.inf, -torch.inf
    arguments = {
        "x": of(x),
        "minus": of(minus) if update else None,
        "timesteps": torch.tensor([601.0, 250.5, -torch.inf, torch.nan]),
        "times": torch.tensor([1.0, 999.0, 500.0, 2.0]),
        "enabled": torch.rand(1, 5, generator=g) < 0.6,
        "seeds": torch.tensor([7]),
        "images": 2,
        "cond": -1,
        "counted": -1,
        "schedule": None,
        "first": 0,
        "last": 0,
        "run_sums": torch.randint(9, (6, 4), generator=g) if run else None,
        "run_last": torch.tensor([801.0, 400.0, 1.0, 9.0, 9.0, 9.0]),
        "run_count": torch.tensor(2),
        "whole_calls": False,
    }
    return arguments | given
