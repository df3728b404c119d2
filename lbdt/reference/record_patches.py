"""Reference of `lbdt::record_patches`: what a call did, into ring buffers on the device."""

import torch
from torch import Tensor


def record_patches(
    mask: Tensor,  # [B, N]
    replaced: Tensor,  # [B, N]
    timesteps: Tensor,  # [B]
    sizes: int,
    rows: Tensor,  # [R, 4], one more with sums and with gated
    cells: Tensor,  # [C]
    written: Tensor,  # [2]
    sums: Tensor | None = None,  # [B, N]
    gated: Tensor | None = None,  # [B]
) -> None:
    """Appends B rows (detected, replaced, bits of the timestep, sizes, with `sums` how many of these are NaN or
    infinite, with `gated` its number) and, where C > 0, B * N cells.

    Eq.: row b goes to `rows[(written[0] + b) % R]`, cell i, bit 0 detected and bit 1 replaced, to
    `cells[(written[1] + i) % C]`; `written` grows by what was added. Ours; no source.
    """
    batch, patches = mask.shape
    row = torch.arange(batch, device=mask.device)
    bits = timesteps.view(torch.int32).to(torch.int64)
    columns = [mask.sum(dim=1), replaced.sum(dim=1), bits, torch.full_like(row, sizes)]
    if sums is not None:
        columns.append(sums.isfinite().logical_not().sum(dim=1))
    if gated is not None:
        columns.append(gated)
    record = torch.stack(columns, dim=1)
    # Of more rows than fit the last ones stay.
    rows.index_copy_(
        0, ((row + written[0] % rows.shape[0]) % rows.shape[0])[-rows.shape[0] :], record[-rows.shape[0] :]
    )
    if cells.shape[0] > 0:
        both = (mask.to(torch.uint8) + 2 * replaced.to(torch.uint8)).flatten()
        cell = torch.arange(batch * patches, device=mask.device)
        place = (cell + written[1] % cells.shape[0]) % cells.shape[0]
        cells.index_copy_(0, place[-cells.shape[0] :], both[-cells.shape[0] :])
        written[1].add_(batch * patches)
    written[0].add_(batch)
