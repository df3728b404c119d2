"""Reference of `lbdt::erase_step`: all that an eraser does in one denoiser call."""

import torch
from torch import Tensor

from lbdt import call_rows
from lbdt.reference.detect_patches import detect_patches
from lbdt.reference.patch_uniform import patch_uniform
from lbdt.reference.record_patches import record_patches
from lbdt.reference.replace_patches import replace_patches


def erase_step(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    timesteps: Tensor,  # [B]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    times: Tensor,  # [T]
    enabled: Tensor,  # [S, U]
    seeds: Tensor,  # [R]
    k: int,
    images: int,
    height: int,
    width: int,
    sizes: int,
    rows: Tensor,  # [*, 5], one more with least
    cells: Tensor,  # [*]
    written: Tensor,  # [2]
    minus: Tensor | None = None,  # like x
    bank: Tensor | None = None,  # [T, M, d]
    known_latents: Tensor | None = None,  # [V]
    known_thresholds: Tensor | None = None,  # [T, V]
    padding: int = 0,
    source: str = "random",
    owners: Tensor | None = None,  # [U]
    least: Tensor | None = None,  # [T, C]
    least_of: int = 0,
    cond: int = -1,
    counted: int = -1,
    schedule: Tensor | None = None,  # [*]
    first: int = 0,
    last: int = 0,
    run_sums: Tensor | None = None,  # [*, C + 1]
    run_last: Tensor | None = None,  # [*]
    run_count: Tensor | None = None,  # []
    whole_calls: bool = False,
    codes: Tensor | None = None,  # [L, d or a few more]
    bounds: Tensor | None = None,  # [6, L]
    centre: Tensor | None = None,  # [d]
    order: Tensor | None = None,  # [L]
) -> Tensor:  # like x
    """`x` with the patches replaced in which a concept is detected, and a record of it.

    Eq. (METHOD.md, 2.2, 2.5, 2.6 and 4.1 to 4.4): `detect_patches` by each row's bin, set, window and branch, with the
    gate and the run's sums where there are; `replace_patches` with numbers of `patch_uniform` and the bank of the bin,
    where patches in which a latent of `known_latents` is detected are no donors in rows with a detected patch;
    `record_patches`, where a patch counts as not finite iff x or minus has a NaN or infinity in it. arXiv 2606.31699.
    """
    weight = weight if order is None else weight.index_select(0, order)
    batch, patches = x.shape[0], x.shape[2:].numel()
    image, half = call_rows.images_of(batch, images, x.device)
    now = timesteps.to(torch.float32)
    bins = call_rows.nearest(now, times)
    on = call_rows.sets_of(enabled, image, images)
    inside = None if schedule is None else call_rows.in_window(now, schedule, (first, last))
    if inside is not None:
        on = on & inside.unsqueeze(1)
    if counted != -1:
        # Branches from 63 on share the mask's sign.
        on = on & ((counted >> half.clamp(max=63)) & 1).bool().unsqueeze(1)

    gate, gated, so_far = (), None, None
    counting = batch if cond < 0 else images
    if least is not None:
        gated = torch.zeros_like(bins)
        if run_sums is not None and batch > 0:
            memory = run_sums[:counting], run_last[:counting], run_count
            so_far = call_rows.begin_call(*memory, now, inside, whole_calls)
        gate = owners, least, least_of, None if cond < 0 else image + cond * images, gated, so_far
    mask = detect_patches(x, weight, bias, latents, thresholds, bins, on, k, minus, *gate)
    if so_far is not None:
        run_sums[:counting].copy_(so_far[:counting])

    avoid = None
    if known_latents is not None:
        on = mask.any(1, keepdim=True).expand(-1, known_latents.shape[0])
        avoid = detect_patches(x, weight, bias, known_latents, known_thresholds, bins, on, k, minus)
    u = patch_uniform(call_rows.seeds_of(seeds, image, images), timesteps, half, patches)
    donors = None if bank is None else bank.index_select(0, bins)
    out, replaced = replace_patches(x, mask, u, height, width, padding, source, donors, avoid)

    finite = x.isfinite() if minus is None else x.isfinite() & minus.isfinite()
    # What record_patches takes to tell them by.
    sums = torch.where(finite.flatten(2).all(1), 0.0, torch.nan)
    record_patches(mask, replaced, now, sizes, rows, cells, written, sums, gated)
    return out
