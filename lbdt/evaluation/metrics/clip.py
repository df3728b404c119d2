"""CLIP score (Hessel et al., EMNLP 2021, without their factor 2.5): how well pictures fit their prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

_BATCH = 32


class Clip:
    """A CLIP model: pictures and texts as unit vectors of one space."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, name: str) -> None:
        """`model`: transformers' `CLIPModel`; `processor`: its image processor; `name`: for reports."""
        self.model, self.name = model.eval().requires_grad_(False), name
        self.tokenizer, self.processor = tokenizer, processor
        self.tokens = model.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> Clip:
        """The model of a folder or Hub repository with safetensors weights, in float32. Pictures are prepared by PIL
        and numpy, whether or not torchvision is there, so that scores do not depend on it.

        Raises OSError (transformers'): no such folder or repository, no safetensors weights.
        """
        import transformers

        # transformers 4 calls by the plain name what 5 does not run without torchvision.
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        name = os.fspath(path_or_repo)
        model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        return cls(
            model.to(device),
            transformers.AutoTokenizer.from_pretrained(name),
            processor.from_pretrained(name),
            name,
        )

    @torch.inference_mode()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 [n, D] on the CPU, rows of length 1."""
        rows = [torch.zeros(0, self.model.config.projection_dim)]
        for first in range(0, len(pictures), _BATCH):
            part = [picture.convert("RGB") for picture in pictures[first : first + _BATCH]]
            # A copy, as torch aligns it: on numpy's memory the same pixels may give scores of other last bits.
            pixels = self.processor(images=part, return_tensors="pt")["pixel_values"].clone()
            rows.append(_unit(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return torch.cat(rows)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, D] on the CPU, rows of length 1. What the model cannot read is cut off."""
        rows = [torch.zeros(0, self.model.config.projection_dim)]
        for first in range(0, len(texts), _BATCH):
            given = self.tokenizer(
                list(texts[first : first + _BATCH]),
                padding=True,
                truncation=True,
                max_length=self.tokens,
                return_tensors="pt",
            ).to(self.model.device)
            features = self.model.get_text_features(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"]
            )
            rows.append(_unit(features))
        return torch.cat(rows)


def clip_scores(clip: Clip, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """float32 [n], 100 * max(cos(picture, its prompt), 0), each in [0, 100]; those of two models cannot be compared.

    Raises:
        ValueError: no pictures, or not one prompt for each.
    """
    if not len(pictures) or len(pictures) != len(prompts):
        raise ValueError(
            f"prompts: expected one for each of one picture or more, got {len(prompts)} and {len(pictures)} pictures"
        )
    cosines = (clip.pictures(pictures) * clip.texts(prompts)).sum(-1)
    return 100 * cosines.clamp(0, 1)


def _unit(features: Any) -> Tensor:
    # A tensor in transformers 4, the vision or text model's whole output in 5.
    features = getattr(features, "pooler_output", features).float().cpu()
    return torch.nn.functional.normalize(features, dim=-1)
