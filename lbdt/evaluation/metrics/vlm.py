"""Artifacts by a vision-language model: Qwen2-VL is asked one yes/no question of every picture.

The paper's rate ("Qwen2-VL-7B", METHOD.md, 8.4) came from a prompt, a way of reading the answers and a set of pictures
that are not published. `QUESTION` and `parse_answer` are ours, and no rate by them is comparable with the paper's.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

QUESTION = (
    "Look at the image as a whole. Does it show visual artifacts, such as noise, smeared or corrupted regions, "
    "unnatural textures, or broken shapes? Answer with one word, yes or no."
)
"""Ours, and not the paper's. "Yes" is an artifact."""
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
"""The format that Qwen2-VL was instructed in."""
_IMAGE = "<|image_pad|>"
_NEW_TOKENS = 8


def parse_answer(answer: str) -> bool | None:
    """True for "yes", False for "no": that one word, in any case, with at most a full stop or exclamation mark and
    white space around it. None for all else: "yes, but", "not", nothing."""
    word = answer.strip().lower()
    word = word[:-1] if word.endswith((".", "!")) else word
    return {"yes": True, "no": False}.get(word)


class ArtifactJudge:
    """A Qwen2-VL that answers `question` of pictures, one at a time, greedily: always the same answer."""

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, name: str, question: str = QUESTION
    ) -> None:
        """`model`: transformers' `Qwen2VLForConditionalGeneration`; `processor`: its image processor."""
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.name, self.question = name, question

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str] = "Qwen/Qwen2-VL-7B-Instruct",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        question: str = QUESTION,
    ) -> ArtifactJudge:
        """The judge of a folder or Hub repository with safetensors weights. 7B in bfloat16 takes 17 GB. Pictures are
        prepared by PIL and numpy, so torchvision is not needed.

        Raises OSError (transformers'): no such folder or repository, no safetensors weights.
        """
        import transformers

        # transformers 4 calls by the plain name what 5 does not run without torchvision.
        processor = (
            getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
        )
        name = os.fspath(path_or_repo)
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            name, use_safetensors=True, dtype=dtype
        )
        return cls(
            model.to(device),
            transformers.AutoTokenizer.from_pretrained(name),
            processor.from_pretrained(name),
            name,
            question,
        )

    @torch.inference_mode()
    def answer(self, picture: Image.Image) -> str:
        """The model's words of one picture, at most 8 tokens."""
        given = self._inputs(picture)
        length = given["input_ids"].shape[1]
        # The repository's generation_config samples; greedy, its settings of sampling would only be warned of.
        tokens = self.model.generate(
            **given, max_new_tokens=_NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        return self.tokenizer.decode(tokens[0, length:], skip_special_tokens=True)

    def _inputs(self, picture: Image.Image) -> dict[str, Tensor]:
        pixels = self.processor(images=[picture.convert("RGB")], return_tensors="pt")
        count = int(pixels["image_grid_thw"][0].prod()) // self.processor.merge_size**2
        text = _CHAT.format(image=_IMAGE * count, question=self.question)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        image = ids == self.model.config.image_token_id
        if int(image.sum()) != count:
            raise ValueError(
                f"{self.name}: its tokenizer made {int(image.sum())} image tokens of {count} {_IMAGE}; expected the "
                f"tokenizer of Qwen2-VL"
            )
        device = self.model.device
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            # A copy, as torch aligns it: on numpy's memory the same pixels may give other last bits.
            "pixel_values": pixels["pixel_values"].to(self.model.dtype, copy=True),
            "image_grid_thw": pixels["image_grid_thw"],
        }
        # transformers 5 wants to be told where the picture is.
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            given["mm_token_type_ids"] = image.int()
        return {name: tensor.to(device) for name, tensor in given.items()}
