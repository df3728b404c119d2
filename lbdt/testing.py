"""What the tests of every backend share: one table of tolerances, and the inputs that stress each op.

A tolerance is `(rms, largest)`: RMS(error) / RMS(reference), and the largest absolute error over the largest absolute
reference. Measured worst beside each entry, on 2 CPU cores with torch 2.13.0.
"""

import torch
from torch import Tensor

TOLERANCES: dict[tuple[torch.dtype, str], tuple[float, float]] = {
    # encode_topk's values against the whole encoder in float64.
    (torch.float64, "encode_topk"): (1e-12, 1e-12),  # worst 2e-16, 3e-16
    (torch.float32, "encode_topk"): (1e-5, 1e-5),  # worst 1e-7, 3e-7
    (torch.float16, "encode_topk"): (1e-3, 1e-3),  # half a unit in the last place of the one cast at the end
    (torch.bfloat16, "encode_topk"): (4e-3, 4e-3),  # as above
    # replace_patches' mean of 5 against a float64 mean.
    (torch.float64, "replace_mean"): (1e-12, 1e-12),
    (torch.float32, "replace_mean"): (1e-6, 1e-6),
    (torch.float16, "replace_mean"): (1e-3, 1e-3),
    (torch.bfloat16, "replace_mean"): (4e-3, 4e-3),
    # Metrics and weights of a short training by two processes against one.
    (torch.float32, "training_loss"): (1e-4, 1e-4),
    (torch.float32, "training_weights"): (1e-3, 1e-2),
    # The same computation again, where tensors lie elsewhere within 64 bytes.
    (torch.float32, "repeated"): (1e-5, 1e-4),
    (torch.float64, "repeated"): (1e-12, 1e-12),
    (torch.float16, "repeated"): (1e-4, 1e-3),  # here and there the next number
    (torch.bfloat16, "repeated"): (1e-3, 8e-3),
    # UCE's closed form against a least squares solver in float64, on weights of the dtype.
    (torch.float64, "least_squares"): (1e-8, 1e-8),
    (torch.float32, "least_squares"): (1e-6, 1e-6),
    (torch.float16, "least_squares"): (1e-3, 1e-3),
    (torch.bfloat16, "least_squares"): (4e-3, 4e-3),
    # Distance from a threshold or from the k-th value, over the largest pre-activation, below which two float32
    # summation orders may decide differently.
    (torch.float32, "detect_margin"): (0.0, 1e-5),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def assert_close(actual: Tensor, expected: Tensor, quantity: str) -> None:
    """AssertionError where `actual` is farther from `expected` than TOLERANCES allow for its dtype."""
    rms, largest = TOLERANCES[actual.dtype, quantity]
    assert actual.shape == expected.shape, (
        f"{quantity}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs()
    scale = expected.double().abs()
    got_rms = float(error.square().mean().sqrt() / scale.square().mean().sqrt().clamp(min=1e-30))
    got_largest = float(error.max() / scale.max().clamp(min=1e-30))
    assert got_rms <= rms, f"{quantity} {actual.dtype}: RMS error {got_rms:.2e} > {rms:.0e}"
    assert got_largest <= largest, (
        f"{quantity} {actual.dtype}: largest error {got_largest:.2e} > {largest:.0e}"
    )


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of `x` [B, d, H, W] under every layout that the ops must take, by name."""
    wide = x.new_full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 3), float("nan"))
    wide[:, 1:-1, 1:, 2:-1] = x
    return {
        "contiguous": x.clone(memory_format=torch.contiguous_format),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "sliced": wide[:, 1:-1, 1:, 2:-1],
        "transposed_grid": x.transpose(2, 3).contiguous().transpose(2, 3),
        "patches": x.flatten(2).clone(memory_format=torch.contiguous_format),
        "tokens_view": x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2),
    }
