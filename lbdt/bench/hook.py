"""A real attached eraser on a pipeline of one block that does nothing, and baselines on the same block."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lbdt import reference
from lbdt.bench import shapes
from lbdt.bench.baselines import PublishedHook, compiled, literal
from lbdt.bench.hardware import peaks
from lbdt.bench.measured_shares import MeasuredShares
from lbdt.bench.shapes import Place, Shape
from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser
from lbdt.editors.attachment import Attachment
from lbdt.sae import SAEConfig, SparseAutoencoder

TIMESTEPS = tuple(range(981, 0, -20))  # 50 steps
TIMESTEP = TIMESTEPS[25]
CONCEPT = "Concept"
_HOOKPOINT = "unet.block"


class Block(nn.Module):
    """Returns the `output` that it is given, as diffusers' attention blocks return theirs: in a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_channels = width

    def forward(self, hidden_states: Tensor, output: Tensor) -> tuple[Tensor]:
        return (output,)


class Unet(nn.Module):
    """A timestep embedding and one block, which is what an eraser needs of a UNet."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace(class_embed_type=None)
        self.time_proj = nn.Identity()
        self.block = Block(width)
        self.anchor = nn.Parameter(torch.zeros((), device=device, dtype=dtype), requires_grad=False)

    def forward(self, timesteps: Tensor, given: Tensor, output: Tensor) -> Tensor:
        """The block's output after its hooks; `given` is its input."""
        self.time_proj(timesteps)
        return self.block(given, output)[0]


class Pipe:
    """A pipeline for `attach`."""

    def __init__(self, shape: Shape, place: Place) -> None:
        self.unet = Unet(shape.width, place.device, place.dtype).eval()
        self.components = {"unet": self.unet}
        self.layout = ("uncond", "cond") if shape.halves > 1 else ("cond",)
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(TIMESTEPS))


def eraser(shape: Shape, arguments: dict[str, Any], seed: int, **settings: Any) -> ConceptEraser:
    """One of the shape's sizes, with the encoder, latents and threshold of `detection`'s `arguments`."""
    config = SAEConfig(
        d_in=shape.width, num_latents=shape.latents, k=shape.k, update=shape.update, encoder_only=True
    )
    with torch.device("meta"):  # the weights are given: no time for random ones
        sae = SparseAutoencoder(config)
    sae.load_state_dict(
        {
            "encoder.weight": arguments["weight"],
            "encoder.bias": arguments["bias"],
            "b_dec": torch.zeros(shape.width, device=arguments["weight"].device),
        },
        assign=True,
    )
    sae.requires_grad_(False)
    own = arguments["latents"].cpu()
    # The published threshold is the mean over concepts, and the concept's own latents score highest.
    mean = torch.zeros(2, len(TIMESTEPS), shape.latents)
    mean[0, :, own] = 2 * shapes.THRESHOLD
    rest = next(i for i in range(shape.latents) if i not in own.tolist())
    mean[1, :, rest] = 2 * shapes.THRESHOLD
    counts = torch.ones(2, len(TIMESTEPS), dtype=torch.int64)
    bank = shapes.bank(shape, seed).repeat(len(TIMESTEPS), 1, 1)
    dictionary = ConceptDictionary((CONCEPT, "Rest"), TIMESTEPS, mean, counts, bank=bank)
    settings = {"padding": shapes.PADDING, "target": shape.target} | settings
    return ConceptEraser(
        sae, dictionary, _HOOKPOINT, selection={"top_k": shape.union, "thresholds": "published"}, **settings
    )


class Stand:
    """The same block four times: bare, with lbdt's hook, the published one, and the compiled formula."""

    def __init__(
        self,
        shape: Shape,
        share: float,
        place: Place,
        measured: MeasuredShares | None = None,
        alike: bool = False,
    ) -> None:
        self.arguments = shapes.detection(shape, share, place=place, measured=measured, alike=alike)
        self.x: Tensor = self.arguments["x"]
        # Without an update SAE nobody looks at the block's input.
        given = self.x if self.arguments["minus"] is None else self.arguments["minus"]
        self.call = (torch.full((shape.batch,), TIMESTEP, device=place.device), given, self.x)
        self.eraser = eraser(shape, self.arguments, place.seed)
        names = ("ours", "published", "compiled", "bare")
        self.pipes = {name: Pipe(shape, place) for name in names}
        self.attach_bytes = peaks(partial(self._attach, place.seed), place.device)["allocated_bytes"]
        encoder = {name: self.arguments[name] for name in ("weight", "bias", "latents", "thresholds", "k")}
        self.published = PublishedHook(**encoder, padding=shapes.PADDING, on_update=shape.update)
        self.pipes["published"].unet.block.register_forward_hook(self.published)
        self.pipes["compiled"].unet.block.register_forward_hook(self._compiled)
        self.replacement = shapes.replacement(shape, 0.0, place=place)

    def _attach(self, seed: int) -> None:
        pipe = self.pipes["ours"]
        self.attachment: Attachment = self.eraser.attach(pipe, [CONCEPT], seed=seed, layout=pipe.layout)

    def versions(self) -> dict[str, Any]:
        """A call of the block with its hook, by name."""
        return {name: partial(pipe.unet, *self.call) for name, pipe in self.pipes.items()}

    def _compiled(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor]:
        mask = compiled(literal)(**self.arguments)
        given = self.replacement | {"x": output[0], "mask": mask}
        return (compiled(reference.replace_patches)(**given)[0],)
