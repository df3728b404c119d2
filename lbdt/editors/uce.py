"""`UCE`: Unified Concept Editing, a closed form for the cross-attention's key and value projections (Gandikota et al.,
WACV 2024, arXiv 2308.14761; METHOD.md, 5.7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lbdt.editors.attachment import choice
from lbdt.hooks import lookup
from lbdt.runs.digests import sha256
from lbdt.runs.reading import brief

TOKENS = ("all", "last")
_TEXTS_AT_ONCE = 64
_edited: WeakSet[nn.Module] = WeakSet()


class EditedWeights:
    """Projections that hold edited weights. A context manager; `remove()` puts the old ones back, bit for bit."""

    def __init__(self, unet: nn.Module, projections: Sequence[nn.Linear], matrix: Tensor) -> None:
        """Multiplies the weights of `projections` by `matrix` [d, d], float64 on the CPU, from the right."""
        self._unet = unet
        self._before: list[tuple[nn.Linear, Tensor]] = []
        _edited.add(unet)
        try:
            for projection in projections:
                old = projection.weight.data
                new = torch.matmul(old.cpu().double(), matrix).to(old.device, old.dtype)
                self._before.append((projection, old))
                projection.weight.data = new
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Puts the old weights back, on the device and in the dtype that the module has by then; may be called
        again."""
        if not self._before:
            _edited.discard(self._unet)
        while self._before:
            projection, old = self._before.pop()
            there = projection.weight.data
            projection.weight.data = old.to(there.device, there.dtype)
            _edited.discard(self._unet)

    def __enter__(self) -> EditedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class UCE:
    """Edits the key and value projections of a UNet's cross-attention, so that a text acts like another one.

    With the text states c of what is erased, c* of what each is mapped to, c_j of what is preserved, and scales e, p:

        W' = (e sum W c* c^T + p sum W c_j c_j^T + r W) (e sum c c^T + p sum c_j c_j^T + r I)^-1

    the least squares solution (METHOD.md, 5.7). It changes the model for every picture until it is removed, and needs
    neither an SAE nor training.

        with UCE([("cats", "")], preserve=["dogs", "trees"]).attach(pipe):
            pictures = pipe(...)
    """

    def __init__(
        self,
        edits: Sequence[tuple[str, str]],
        preserve: Sequence[str] = (),
        *,
        erase_scale: float = 1.0,
        preserve_scale: float = 1.0,
        ridge: float = 0.5,
        tokens: str = "all",
    ) -> None:
        """
        Args:
            edits: (text to erase, text that it is mapped to, which may be ""), one or more.
            preserve: texts whose keys and values are to stay.
            erase_scale, preserve_scale: e and p; released: 1 and 1.
            ridge: r, what holds the weights near the old ones; released: 0.5.
            tokens: whose states stand for a text. "last": the last word's token, as in the released script. "all": of
                an edit, every token from the first on in which its texts differ, to the end of the padding (tokens
                behind a word know of it too); of a preserved text, all.

        Raises:
            TypeError, ValueError: the argument, what was expected, what was given.
        """
        if isinstance(edits, str) or not isinstance(edits, Sequence) or not edits:
            raise ValueError(
                f'edits: expected one or more pairs such as ("cats", ""), got {brief(edits) if edits else "none"}'
            )
        for edit in edits:
            pair = isinstance(edit, Sequence) and not isinstance(edit, str) and len(edit) == 2
            if not pair or not all(isinstance(text, str) for text in edit):
                raise TypeError(f'edits: expected pairs of texts such as ("cats", ""), got {brief(edit)}')
        if isinstance(preserve, str) or not all(isinstance(text, str) for text in preserve):
            raise TypeError(f"preserve: expected a list of texts, got {brief(preserve)}")
        for name, value, least in (
            ("erase_scale", erase_scale, "> 0"),
            ("preserve_scale", preserve_scale, ">= 0"),
            ("ridge", ridge, "> 0"),
        ):
            _check_scale(name, value, least)
        self.edits = tuple((old, new) for old, new in edits)
        self.preserve = tuple(preserve)
        self.erase_scale, self.preserve_scale, self.ridge = erase_scale, preserve_scale, ridge
        self.tokens = choice("tokens", tokens, TOKENS)

    def attach(self, pipe: Any) -> EditedWeights:
        """Solves for this pipeline's texts and edits its weights, until the returned handle is removed.

        Raises:
            TypeError, ValueError: before anything is changed: no pipeline with a UNet, tokenizer and `encode_prompt`;
                no cross-attention on its text states; weights that are not there (offloaded) or not floating point;
                another `UCE` that is still on.
        """
        unet = lookup.find_unet(pipe)
        for name in ("encode_prompt", "tokenizer"):
            if not callable(getattr(pipe, name, None)):
                raise ValueError(f"pipe: {type(pipe).__name__} has no {name}, and texts are what is edited")
        if unet in _edited:
            raise ValueError("pipe: its UNet is edited by a UCE already; remove() that handle first")
        projections = cross_attention_projections(unet)
        with torch.inference_mode(False), torch.no_grad():
            old, new, kept = self._states(pipe)
            for projection in projections:
                if projection.in_features != old.shape[1]:
                    raise ValueError(
                        f"pipe: cross-attention reads states of width {projection.in_features}, but encode_prompt "
                        f"gives {old.shape[1]}; this pipeline's text encoders are not supported"
                    )
            matrix = edit_matrix(old, new, kept, self.erase_scale, self.preserve_scale, self.ridge)
            return EditedWeights(unet, projections, matrix)

    def digest(self) -> str:
        """SHA-256 of the texts and the settings."""
        settings = (self.erase_scale, self.preserve_scale, self.ridge, self.tokens)
        return sha256(repr((self.edits, self.preserve, settings)))

    def _states(self, pipe: Any) -> tuple[Tensor, Tensor, Tensor]:
        """float64 on the CPU: states to erase [E, d], those they are mapped to [E, d], and preserved ones [P, d]."""
        texts = list(dict.fromkeys([text for edit in self.edits for text in edit] + list(self.preserve)))
        place = {text: number for number, text in enumerate(texts)}
        ids = pipe.tokenizer(texts, padding="max_length", max_length=_length(pipe), truncation=True)
        words = [row[: sum(mask)] for row, mask in zip(ids["input_ids"], ids["attention_mask"], strict=True)]
        states = _encoded(pipe, texts)
        total = states.shape[1]
        old, new, kept = [], [], []
        for erased, target in self.edits:
            a, b = place[erased], place[target]
            for i, j in _aligned(words[a], words[b], total, self.tokens):
                old.append(states[a, i])
                new.append(states[b, j])
        for text in self.preserve:
            row = place[text]
            kept += list(states[row]) if self.tokens == "all" else [states[row, _last(words[row])]]
        nothing = states.new_zeros(0, states.shape[2])
        return torch.stack(old), torch.stack(new), torch.stack(kept) if kept else nothing


def edit_matrix(
    old: Tensor, new: Tensor, kept: Tensor, erase_scale: float, preserve_scale: float, ridge: float
) -> Tensor:
    """M [d, d] with W' = W M for every projection W: `I + e sum (c* - c) c^T A^-1`, A the matrix of METHOD.md, 5.7.

    Args:
        old, new: float64 [E, d], states to erase and those they are mapped to.
        kept: float64 [P, d], states to preserve.
    """
    identity = torch.eye(old.shape[1], dtype=old.dtype)
    moments = erase_scale * old.T @ old + preserve_scale * kept.T @ kept + ridge * identity
    moved = erase_scale * (new - old).T @ old
    return identity + torch.linalg.solve(moments, moved, left=False)


def cross_attention_projections(unet: nn.Module) -> list[nn.Linear]:
    """The key and value projections of every cross-attention, in the order of the modules.

    Raises:
        ValueError: there is none, or one that is no plain linear layer with a weight of its own.
    """
    found = []
    for name, module in unet.named_modules():
        if not getattr(module, "is_cross_attention", False):
            continue
        for part in ("to_k", "to_v"):
            projection = getattr(module, part, None)
            if not isinstance(projection, nn.Linear):
                raise ValueError(
                    f"pipe: expected unet.{name}.{part} to be a linear layer, got {type(projection).__name__}; unload "
                    "adapters and quantisation first"
                )
            if projection.weight.is_meta or not projection.weight.is_floating_point():
                state = "offloaded" if projection.weight.is_meta else "quantised"
                raise ValueError(
                    f"pipe: the weight of unet.{name}.{part} is {state}; load the UNet whole, in floating point"
                )
            found.append(projection)
    if not found:
        raise ValueError("pipe: its UNet has no cross-attention, so no text to edit")
    return found


def _check_scale(name: str, value: Any, least: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number {least}, got {brief(value)}")
    if not math.isfinite(value) or value < 0 or (least == "> 0" and value == 0):
        raise ValueError(f"{name}: expected a finite number {least}, got {value}")


def _length(pipe: Any) -> int:
    return pipe.tokenizer.model_max_length


def _encoded(pipe: Any, texts: Sequence[str]) -> Tensor:
    """float64 [texts, tokens, d] on the CPU, as the pipeline encodes its prompts."""
    device = getattr(pipe, "_execution_device", None) or next(pipe.unet.parameters()).device
    states = [
        pipe.encode_prompt(
            prompt=list(texts[first : first + _TEXTS_AT_ONCE]),
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]
        for first in range(0, len(texts), _TEXTS_AT_ONCE)
    ]
    return torch.cat([each.cpu().double() for each in states])


def _last(words: Sequence[int]) -> int:
    """The place of the last word; of an empty text, that of the token that begins it."""
    return len(words) - 2


def _aligned(old: Sequence[int], new: Sequence[int], total: int, tokens: str) -> list[tuple[int, int]]:
    """Places of the erased text's states, each with that in the other text that it is mapped to.

    `old`, `new`: token ids, with the one that begins and the one that ends a text; `total`: tokens with padding. What
    both texts end with is mapped one to one, as is the padding; what stands in place of it in the middle likewise, and
    what has no counterpart is mapped to the token before it.
    """
    if tokens == "last":
        return [(_last(old), _last(new))]
    shortest = min(len(old), len(new))
    front = next((n for n in range(shortest) if old[n] != new[n]), shortest)
    back = 0
    while back < shortest - front and old[-1 - back] == new[-1 - back]:
        back += 1
    middle, last = len(old) - back, len(new) - back - 1
    pairs = [(place, min(place, last)) for place in range(front, middle)]
    rest = back + total - max(len(old), len(new))
    return pairs + [(middle + n, last + 1 + n) for n in range(rest)]
