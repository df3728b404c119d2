"""Reference of `lbdt::detect_patches`: which patches carry a concept, by the rank identity."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Floats that one block of dictionary pre-activations may hold (4 MiB in float32).
_BLOCK = 1 << 20
_ROWS = 1024
QUARTERS = 4
"""What `least` counts in over the calls of a run: parts of a patch."""
FOUND = 1 << 40
"""A sum of `so_far` of a concept that was found."""
_MOST = 1 << 28


def detect_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    timestep_bin: Tensor,  # [B]
    enabled: Tensor,  # [B, U]
    k: int,
    minus: Tensor | None = None,  # like x
    owners: Tensor | None = None,  # [U]
    least: Tensor | None = None,  # [T, C]
    least_of: int = 0,
    deciding: Tensor | None = None,  # [B]
    gated: Tensor | None = None,  # [B]
    so_far: Tensor | None = None,  # [B, C + 1]
    codes: Tensor | None = None,  # [L, d or a few more]
    bounds: Tensor | None = None,  # [6, L]
    centre: Tensor | None = None,  # [d]
    order: Tensor | None = None,  # [L]
) -> Tensor:  # [B, N]
    """Mask of the patches in which an enabled latent is detected, in the rows that carry its concept.

    Eq. (METHOD.md, 2.1 and 2.2): latent u of patch p is detected iff `h_u > mu_u` and, for k > 0,
    `#{j != u : h_j > h_u} < k`, with `h = weight (x - minus) + bias`. Of the latents of a patch above their
    threshold only the largest needs the rank test, and it needs a count, so nothing of size N x L is held.
    arXiv 2606.31699; the identity is ours.

    With `least`, the gate (METHOD.md, 2.5): a detected patch is evidence for every concept of which a latent is above
    its threshold there. Row b carries c iff the row `deciding[b]` has n patches of evidence for it with `least <= 1` or
    `floor(n * least_of / N) >= least`. A patch stays in the mask iff it is evidence for a concept that its row carries;
    how many did not stay is written to `gated`.

    With `so_far`, the gate over the calls of a run (METHOD.md, 2.6): `least` counts quarters of a patch, n is the mean
    over the calls that were added up in `so_far`, this one with them, and a concept that was found in a row is carried
    from then on.
    """
    # Which patches need the rank test is data: elsewhere than on the CPU, reading it would wait for the device.
    select = x.device.type == "cpu"
    weight = weight if order is None else weight.index_select(0, order)
    mask, evidence = _detect(
        *(x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus, select),
        None if least is None else F.one_hot(owners, least.shape[1]),
    )
    if least is None:
        return mask
    kept = _kept(
        evidence & mask.unsqueeze(2), least[timestep_bin], least_of or mask.shape[1], deciding, so_far
    )
    if gated is not None:
        gated.copy_(mask.sum(dim=1) - kept.sum(dim=1))
    return kept


def _kept(
    evidence: Tensor, needed: Tensor, least_of: int, deciding: Tensor | None, so_far: Tensor | None
) -> Tensor:
    """The patches that are evidence [B, N, C] for a concept that their row carries, by the counts `needed` [B, C] on
    maps of `least_of` patches; bool [B, N]. Adds up `so_far`."""
    found, patches = evidence.sum(dim=1), max(evidence.shape[1], 1)
    if deciding is not None:
        found, needed = found.index_select(0, deciding), needed.index_select(0, deciding)
    if so_far is None:
        # Divided, as needed * N may overflow.
        carries = (needed <= 1) | (found * least_of // patches >= needed)
    else:
        sums, calls = so_far[:, :-1].add_(found), so_far[:, -1:].add_(1)
        before = sums >= FOUND
        # Clamped for the product; calls for a count that is none.
        mean = sums.clamp(0, _MOST) * least_of // patches * QUARTERS // calls.clamp(min=1)
        carries = before | (needed <= 1) | (mean >= needed)
        sums.masked_fill_(carries & (sums > 0), FOUND)
    return (evidence & carries.unsqueeze(1)).any(dim=2)


def _detect(
    x,
    weight,
    bias,
    latents,
    thresholds,
    timestep_bin,
    enabled,
    k,
    minus,
    select: bool,
    owners: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The mask before the gate and, by `owners` [U, C] of ones and zeros, for which concepts a patch is evidence if it
    is detected, bool [B, N, C]; where `select`, only candidates are counted, and until their count reaches k."""
    x = x.flatten(2)
    minus = None if minus is None else minus.flatten(2)
    batch, width, patches = x.shape
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=x.device)
    evidence = None if owners is None else mask.new_zeros(batch, patches, owners.shape[1])
    if mask.numel() == 0 or latents.numel() == 0:
        return mask, evidence
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    own_weight = weight[latents].to(dtype)
    own_bias = bias[latents].to(dtype).unsqueeze(1)
    floor = thresholds[timestep_bin].to(dtype).masked_fill(~enabled, torch.inf)

    largest = torch.empty(batch, patches, dtype=dtype, device=x.device)
    owner = torch.empty(batch, patches, dtype=torch.int64, device=x.device)
    for image in range(batch):
        columns = x[image].to(dtype)
        if minus is not None:
            columns = columns - minus[image].to(dtype)
        h = torch.addmm(own_bias, own_weight, columns)  # [U, N]
        passing = h > floor[image].unsqueeze(1)
        if owners is not None:
            evidence[image] = (passing.t().float() @ owners.float()) > 0
        largest[image], position = torch.where(passing, h, -torch.inf).max(dim=0)
        owner[image] = latents[position]
    candidate = largest > -torch.inf
    if k == 0:
        return candidate, evidence

    if select:
        ranked = candidate.flatten().nonzero().squeeze(1)
    else:
        ranked = torch.arange(batch * patches, device=x.device)
    for start in range(0, ranked.numel(), _ROWS):
        rows = ranked[start : start + _ROWS]
        image, place = rows // patches, rows % patches
        patch = x[image, :, place].to(dtype)
        if minus is not None:
            patch = patch - minus[image, :, place].to(dtype)
        inside = _in_first_k(patch, largest[image, place], owner[image, place], weight, bias, k, select)
        mask[image, place] = inside & candidate[image, place]
    return mask, evidence


def _in_first_k(patch, value, owner, weight, bias, k: int, select: bool) -> Tensor:
    """Whether fewer than k latents other than `owner` [C] exceed `value` [C] on `patch` [C, d]; bool [C]."""
    total = weight.shape[0]
    inside = torch.zeros(patch.shape[0], dtype=torch.bool, device=patch.device)
    rows = torch.arange(patch.shape[0], device=patch.device)
    count = torch.zeros_like(rows)
    start = 0
    while start < total and rows.numel() > 0:
        # The weight slice is converted too when it is in half precision, so both bound the block.
        size = max(64, _BLOCK // max(rows.numel(), patch.shape[1]))
        stop = min(start + size, total)
        h = torch.addmm(bias[start:stop].to(patch.dtype), patch, weight[start:stop].to(patch.dtype).t())
        # Ones and zeros in h's own dtype: they are summed several times faster than bools.
        larger = h.gt_(value.unsqueeze(1))
        # By index, not by value: the owner's two computations may round differently.
        here = (owner >= start) & (owner < stop)
        own = larger.gather(1, (owner - start).clamp(0, stop - start - 1).unsqueeze(1)).squeeze(1)
        count += (larger.sum(dim=1) - own * here).to(count.dtype)
        if select:
            alive = count < k
            if not bool(alive.all()):
                rows, patch, value, owner, count = (t[alive] for t in (rows, patch, value, owner, count))
        start = stop
    inside[rows] = count < k
    return inside
