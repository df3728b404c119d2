"""The small models of EmojiCanvas, built of ordinary diffusers and transformers classes."""

from __future__ import annotations

import json
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lbdt.canvas.scenes import OBJECTS, STYLES, prompt
from lbdt.runs.files import write_files

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LATENT_SIDE = 32
TOKENS = 24
TEXT_WIDTH = 96


class Classifier(nn.Module):
    """Four strided convolutions, max pool, linear head: images [B, 3, 128, 128] in [-1, 1] -> logits [B, classes]."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 6 * width)
        blocks: list[nn.Module] = []
        for i in range(4):
            blocks += [
                nn.Conv2d(widths[i], widths[i + 1], 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1),
                nn.GroupNorm(8, widths[i + 1]),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, 128, 128] in [-1, 1] -> pooled features [B, 6 * width]."""
        return self.body(images).amax(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def build_vae() -> AutoencoderTiny:
    """An `AutoencoderTiny`: 128 px -> 4 x 32 x 32 latents, 0.26 M parameters."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
    )


def build_unet(layout: str = "bottleneck", widths: tuple[int, ...] = (32, 64, 192)) -> UNet2DConditionModel:
    """A `UNet2DConditionModel` on 4 x 32 x 32 latents.

    Args:
        layout: which levels ask the prompt (lbdt/canvas/README.md): `"bottleneck"`, `"two_levels"` or `"up_only"`.
        widths: channels of the three levels.
    """
    from diffusers import UNet2DConditionModel

    plain, cross = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    levels = {
        "bottleneck": (plain, plain, cross),
        "two_levels": (plain, cross, cross),
        "up_only": (plain,) * 3,
    }
    down = [pair[0] for pair in levels[layout]]
    up = [pair[1] for pair in reversed(levels[layout])]
    mid = "UNetMidBlock2DCrossAttn"
    if layout == "up_only":
        up[0], mid = "CrossAttnUpBlock2D", "UNetMidBlock2D"
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=down,
        mid_block_type=mid,
        up_block_types=up,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction on a schedule that ends at (nearly) no signal, trailing timesteps: no grey cast."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build_text_encoder(vocabulary: int, end: int) -> CLIPTextModel:
    """A two-layer CLIP text model for `TOKENS` tokens out of `vocabulary`, of which `end` ends a text."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A `CLIPTokenizer` of the prompts' words, whose byte-pair vocabulary is written to `folder`.

    Other words are spelled in letters, so every prompt is accepted.
    """
    from transformers import CLIPTokenizer

    words = {word.strip(".").lower() for s in (None, *STYLES) for word in prompt(OBJECTS, s).split()}
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-_")
    merges: dict[tuple[str, str], None] = {}
    for word in _merge_order(words):
        pieces = _pieces(word)
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = ["".join(pieces[:2]), *pieces[2:]]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    write_files(folder, {"vocab.json": vocabulary.encode(), "merges.txt": lines.encode()})
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def _pieces(word: str) -> list[str]:
    """The letters that byte-pair merges begin with; the last one is marked."""
    return [*word[:-1], word[-1] + "</w>"]


def _merge_order(words: Collection[str]) -> list[str]:
    """`words` in an order in which each becomes one token: earlier merges win, so "sandwiches" comes before "and",
    whose first merge would cut it."""
    order = TopologicalSorter()
    for word in sorted(words):
        pieces = _pieces(word)
        inside = set(zip(pieces[1:], pieces[2:], strict=False))
        cutters = [other for other in sorted(words) if other != word and tuple(_pieces(other)[:2]) in inside]
        order.add(word)
        for other in cutters:
            order.add(other, word)
    return list(order.static_order())


CLASSIFIERS = {"object": len(OBJECTS), "style": len(STYLES), "fault": 1}
"""The judges and their outputs: a logit an object, which any number of may pass 0; one a style; one for a fault."""


def load_classifiers(folder: Path) -> dict[str, Classifier]:
    """The judges of `CLASSIFIERS`, from `object_classifier.safetensors` and so on."""
    from safetensors.torch import load_file

    nets = {}
    for name, classes in CLASSIFIERS.items():
        net = Classifier(classes)
        tensors = load_file(folder / f"{name}_classifier.safetensors")
        net.load_state_dict({k: v.float() for k, v in tensors.items()})
        nets[name] = net.eval()
    return nets
