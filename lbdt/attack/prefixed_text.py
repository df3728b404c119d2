"""A prompt with free tokens in it, in front of it by default: its ids, its text, and its embedding for the UNet."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lbdt.hooks.lookup import unwrap

POSITIONS = ("prefix", "suffix", "middle")
"""Where the free tokens are: before the prompt, after it, or in the middle of its tokens."""
_WANTED = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


class PrefixedText:
    """`[start] prefix prompt [end] padding`, as the pipeline's tokenizer would lay it out; the prefix may stand
    elsewhere (`POSITIONS`), and is called so there too.

    The embedding always comes from the token ids: a text need not give back the tokens that it was made of (`text`).
    Special tokens are no part of a prefix: nobody can type them, and the end token would cut the prompt off. The
    published attack leaves them in.
    """

    def __init__(self, pipe: Any, text: str, tokens: int, position: str = "prefix") -> None:
        """
        Args:
            pipe: a diffusers pipeline of Stable Diffusion's kind with one CLIP text encoder.
            text: the prompt.
            tokens: length k of the prefix.
            position: one of `POSITIONS`; of an odd number of tokens the middle is after the smaller half.

        Raises:
            TypeError, ValueError: another kind of pipeline; a prompt that does not fit with the prefix; an unknown
                position.
        """
        check_pipeline(pipe)
        if position not in POSITIONS:
            raise ValueError(f"position: expected one of {', '.join(POSITIONS)}, got {position!r}")
        self._pipe, self.tokens = pipe, tokens
        tokenizer = pipe.tokenizer
        ids = tokenizer(text).input_ids
        if not ids or ids[0] != tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id:
            raise ValueError(
                f"pipe: {type(tokenizer).__name__} does not put a start and an end token around a prompt; expected a "
                "CLIP tokenizer"
            )
        length = tokenizer.model_max_length
        if len(ids) + tokens > length:
            raise ValueError(
                f"tokens: {tokens} and the {len(ids)} of {text!r} are more than the text encoder's {length}; take a "
                "shorter prompt or prefix"
            )
        prompt = ids[1:-1]
        cut = {"prefix": 0, "suffix": len(prompt), "middle": len(prompt) // 2}[position]
        self._before, self._after = prompt[:cut], prompt[cut:]
        padding = ids[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._tail = [ids[-1], *[padding] * (length - len(ids) - tokens)]

    @functools.cached_property
    def vocabulary(self) -> Tensor:
        """int64 [V]: the ids that a prefix may hold."""
        special = set(self._pipe.tokenizer.all_special_ids)
        ids = [i for i in range(len(self._pipe.tokenizer)) if i not in special]
        return torch.tensor(ids, device=self._embeddings().weight.device)

    @functools.cached_property
    def _rows(self) -> Tensor:
        """float32 [V, D]: their embeddings."""
        return self._embeddings().weight.detach().index_select(0, self.vocabulary).float()

    def ids(self, prefix: Tensor) -> Tensor:
        """Token ids int64 [1, length] with `prefix` [k], places in `vocabulary`, at its position in the prompt."""
        start = self._pipe.tokenizer.bos_token_id
        chosen = self.vocabulary[prefix.to(self.vocabulary.device)].tolist()
        row = [start, *self._before, *chosen, *self._after, *self._tail]
        return torch.tensor([row], device=self.vocabulary.device)

    def embed(self, prefix: Tensor) -> Tensor:
        """What the UNet is given for `prefix` [k], [1, length, D], without gradient."""
        with torch.no_grad():
            return self._encode(self.ids(prefix))

    def embed_soft(self, one_hot: Tensor) -> Tensor:
        """The same from `one_hot` float32 | float64 [k, V], with the gradient to it."""
        rows = torch.matmul(one_hot, self._rows.to(one_hot.dtype))

        def put(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            first = 1 + len(self._before)
            parts = output[:, :first], rows.to(output.dtype).unsqueeze(0), output[:, first + self.tokens :]
            return torch.cat(parts, dim=1)

        handle = self._embeddings().register_forward_hook(put)
        try:
            return self._encode(self.ids(one_hot.detach().argmax(1)))
        finally:
            handle.remove()

    def words(self, prefix: Tensor) -> list[str]:
        """The tokens of `prefix` as the vocabulary spells them; "</w>" ends a word."""
        return self._pipe.tokenizer.convert_ids_to_tokens(self.vocabulary[prefix].tolist())

    def text(self, prefix: Tensor) -> tuple[str, bool]:
        """The attacked prompt as text, and whether the tokenizer makes the same ids of it."""
        tokenizer, ids = self._pipe.tokenizer, self.ids(prefix)[0].tolist()
        inner = ids[1 : 1 + len(self._before) + self.tokens + len(self._after)]
        text = tokenizer.decode(inner, clean_up_tokenization_spaces=False).strip()
        again = tokenizer(text, padding="max_length", max_length=len(ids), truncation=True).input_ids
        return text, again == ids

    def _embeddings(self) -> nn.Embedding:
        return unwrap(self._pipe.text_encoder).get_input_embeddings()

    def _encode(self, ids: Tensor) -> Tensor:
        encoder = self._pipe.text_encoder
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            # Of the tokens up to the end token; padding may be the end token too.
            mask = torch.ones_like(ids)
            mask[:, ids.shape[1] - len(self._tail) + 1 :] = 0
        return encoder(ids, attention_mask=mask)[0]


def check_pipeline(pipe: Any) -> None:
    """TypeError, ValueError unless `pipe` is of Stable Diffusion's kind, with one text encoder and a noise schedule."""
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    missing = [name for name in _WANTED if getattr(pipe, name, None) is None]
    others = [name for name in ("text_encoder_2", "image_encoder") if getattr(pipe, name, None) is not None]
    if missing or others:
        found = f"no {', '.join(missing)}" if missing else f"{', '.join(others)} besides"
        raise ValueError(
            f"pipe: {type(pipe).__name__} has {found}; the attack needs a pipeline like StableDiffusionPipeline, with "
            "one CLIP text encoder"
        )
    if not hasattr(unwrap(pipe.text_encoder), "get_input_embeddings"):
        raise ValueError(f"pipe: {type(pipe.text_encoder).__name__} has no token embeddings to attack")
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"pipe: {type(pipe.scheduler).__name__} has no alphas_cumprod; expected a scheduler of a diffusion model, "
            "such as DDIMScheduler"
        )
