"""Arguments of the CUDA C++ ops for tests that run their sources, or their PTX, without a GPU."""

import torch


def replacement(
    B=2, d=16, H=8, W=8, rate=0.2, dtype=torch.float32, padding=1, source="random", bank=0, seed=0, avoid=None
) -> dict:
    """Arguments of replace_patches by name. `rate`: of masked patches. `bank`: its rows, of which at least one image is
    in need. `avoid`: share of the patches to avoid; None: no such tensor."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, H * W, generator=g) < rate
    if bank:
        mask[-1] = True  # at least one image without a donor
    x = torch.randn(B, d, H, W, generator=g)
    x[x.abs() < 0.1] = -0.0
    return {
        "x": x.to(dtype),
        "mask": mask,
        "u": torch.rand(B, H * W, generator=g),
        "height": H,
        "width": W,
        "padding": padding,
        "source": source,
        "bank": torch.randn(B, bank, d, generator=g).to(dtype) if bank else None,
        "avoid": None if avoid is None else torch.rand(B, H * W, generator=g) < avoid,
    }


def numbering(dtype: torch.dtype, patches: int) -> dict:
    """Arguments of patch_uniform by name, of five images: seeds and timesteps at the ends of their ranges."""
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    times = torch.tensor([0.0, 981.75, -0.5, -7.0, 3.0])
    if dtype.is_floating_point:
        times[4] = float("nan")
    halves = torch.tensor([1]).expand(5)
    return {"seeds": seeds, "timesteps": times.to(dtype), "halves": halves, "patches": patches}
