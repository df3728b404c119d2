"""What the attack minimises: the UNet's error on a noised picture of the erased concept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class ReferenceLoss:
    """`MSE(prediction, target)` on `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`, x_0 the latent of a reference picture.

    The target is what the UNet was trained to give at x_t: the noise, as published (METHOD.md, 8.7), and for
    v-prediction `sqrt(a_t) noise - sqrt(1 - a_t) x_0`, for sample prediction x_0. Only the conditional half runs.

    Whatever is attached to the pipeline takes part, and finds its thresholds by the timestep that the UNet is given,
    so they are those of the sampling. (The published script hands its hook a step index instead, which counts the
    sampled timesteps upwards while the thresholds are stored downwards.)
    """

    def __init__(self, pipe: Any, latent: Tensor) -> None:
        """
        Args:
            pipe: a pipeline of Stable Diffusion's kind.
            latent: [1, C, h, w], scaled as the UNet takes it.

        Raises:
            ValueError: an unknown prediction type.
        """
        kind = pipe.scheduler.config.prediction_type
        if kind not in PREDICTIONS:
            raise ValueError(f"scheduler: expected prediction type {' or '.join(PREDICTIONS)}, got {kind!r}")
        self._pipe, self._kind = pipe, kind
        self._latent = latent.float()
        self._alphas = pipe.scheduler.alphas_cumprod.double().cpu()

    @property
    def timesteps(self) -> int:
        """How many timesteps the noise schedule has."""
        return len(self._alphas)

    def __call__(self, embedding: Tensor, timestep: int, generator: torch.Generator) -> Tensor:
        """The loss at one timestep, a float32 scalar, for `embedding` [1, length, D]; `generator`, on the CPU, draws
        the noise."""
        x0 = self._latent
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        a = float(self._alphas[timestep])
        signal, sigma = a**0.5, (1 - a) ** 0.5
        noised = signal * x0 + sigma * noise
        target = {"epsilon": noise, "v_prediction": signal * noise - sigma * x0, "sample": x0}[self._kind]
        unet = self._pipe.unet
        where = torch.tensor([timestep], device=x0.device)
        (predicted,) = unet(
            noised.to(unet.dtype), where, encoder_hidden_states=embedding.to(unet.dtype), return_dict=False
        )[:1]
        return torch.nn.functional.mse_loss(predicted.float(), target)


def latent_of(pipe: Any, picture: Any) -> Tensor:
    """A picture's latent [1, C, h, w] by the pipeline's VAE (the mean, where it gives a distribution), scaled as the
    UNet takes it."""
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(picture).to(vae.device, vae.dtype)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    latent = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latent - shift) * vae.config.scaling_factor


def spread(count: int, timesteps: int) -> list[int]:
    """`count` timesteps at the middles of as many equal parts of [0, timesteps), ascending: 10, 30, ..., 990 for 50 of
    1000, as published.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= count <= timesteps:
        raise ValueError(f"timesteps: expected 1 to {timesteps} of them, got {count}")
    return [(2 * i + 1) * timesteps // (2 * count) for i in range(count)]


@contextlib.contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """No parameter of the UNet and the text encoder asks for a gradient inside; afterwards as before."""
    parameters = [p for model in (pipe.unet, pipe.text_encoder) for p in model.parameters()]
    asked = [p for p in parameters if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
