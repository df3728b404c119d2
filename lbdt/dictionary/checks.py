"""Checks that the parts of the dictionary share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbdt.runs.reading import brief, listed
from lbdt.runs.wording import require_unicode

if TYPE_CHECKING:
    from lbdt.sae import SparseCode


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """ValueError unless `tensor` is not empty and of this shape; None: any size."""
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(e is not None and e != g for e, g in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if not tensor.numel():
        raise ValueError(f"{name}: expected a tensor with elements, got shape {list(got)}")


def require_range(name: str, tensor: Tensor) -> None:
    """ValueError unless all values are finite and >= 0."""
    if not bool(((tensor >= 0) & torch.isfinite(tensor)).all()):
        raise ValueError(f"{name}: expected finite values >= 0, got negative, infinite or NaN ones")


def checked_concepts(concepts: Sequence[str]) -> tuple[str, ...]:
    """Distinct, non-empty names."""
    if isinstance(concepts, str):
        raise TypeError(f"concepts: expected a sequence of names, got the string {concepts!r}")
    names = tuple(concepts)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"concepts: expected one or more non-empty names, got {listed(names) or 'none'}")
    for name in names:
        require_unicode("concepts", name)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"concepts: expected distinct names, got {listed(repeated)} more than once")
    return names


def checked_assignment(
    assigned: Mapping[str, int] | None, concepts: Sequence[str], num_latents: int
) -> dict[str, int] | None:
    """Distinct latents in [0, L) of some of the concepts, in their order; None where there are none."""
    if not assigned:
        return None
    unknown = sorted(set(assigned) - set(concepts))
    if unknown:
        raise ValueError(f"assigned: unknown concept {listed(unknown)}; known: {listed(concepts)}")
    for name, latent in assigned.items():
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < num_latents:
            raise ValueError(
                f"assigned: expected a latent in [0, {num_latents}) for {brief(name)}, got {brief(latent)}"
            )
    owners: dict[int, str] = {}
    for name, latent in assigned.items():
        if owners.setdefault(latent, name) != name:
            raise ValueError(f"assigned: latent {latent} belongs to both {owners[latent]!r} and {name!r}")
    return {name: assigned[name] for name in concepts if name in assigned}


def checked_timesteps(timesteps: Tensor | Sequence[int]) -> Tensor:
    """[T] int64 on the CPU, strictly descending."""
    given = torch.as_tensor(timesteps).cpu()
    values = given.to(torch.int64)
    if given.dim() != 1 or not given.numel():
        raise ValueError(f"timesteps: expected a non-empty list [T], got shape {tuple(given.shape)}")
    if not bool((given == values).all()):
        raise ValueError(
            f"timesteps: expected whole numbers, got {listed(given.tolist())}; round them for the bins"
        )
    if not bool((values[1:] < values[:-1]).all()):
        raise ValueError(f"timesteps: expected strictly descending values, got {listed(values.tolist())}")
    return values.clone()


def checked_code(code: SparseCode, num_latents: int) -> tuple[Tensor, Tensor, int]:
    """The entries of `code`, flat on the CPU (float32, int64), and its number of patches."""
    values, indices = code
    if values.shape != indices.shape or values.dim() < 2:
        raise ValueError(
            f"code: expected values and indices of one shape [B, N, k], got {tuple(values.shape)} and "
            f"{tuple(indices.shape)}"
        )
    patches = values[..., 0].numel() if values.shape[-1] else 0
    values, indices = values.detach().reshape(-1).float().cpu(), indices.reshape(-1).long().cpu()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= num_latents):
        raise ValueError(
            f"code: expected indices in [0, {num_latents}), got {int(indices.min())} to "
            f"{int(indices.max())}; the SAE is not the one that these statistics were made for"
        )
    if not bool((values >= 0).all()) or not bool(torch.isfinite(values).all()):
        raise ValueError("code: expected finite activations >= 0, got negative, infinite or NaN values")
    return values, indices, patches


def check_place(concept: int, bin: int, counts: Tensor) -> None:
    """Negative numbers would silently count from the end."""
    if not 0 <= concept < counts.shape[0] or not 0 <= bin < counts.shape[1]:
        raise ValueError(
            f"expected concept in [0, {counts.shape[0]}) and bin in [0, {counts.shape[1]}), got {concept} "
            f"and {bin}"
        )


def joined_site(first: str | None, second: str | None) -> str | None:
    """The site of two dictionaries that merge, of which one may not be known. ValueError where they are of two."""
    if None not in (first, second) and first != second:
        raise ValueError(f"cannot merge: dictionaries of {first} and of {second}; one SAE per dictionary")
    return second if first is None else first


def require_same(first, second) -> None:
    """Both have the same concepts, timesteps and number of latents."""
    if first.concepts != second.concepts:
        raise ValueError(f"cannot merge: concepts {first.concepts} and {second.concepts} differ")
    require_same_bins(first, second)


def require_same_bins(first, second) -> None:
    """Both have the same timesteps and number of latents."""
    if not torch.equal(first.timesteps, second.timesteps):
        raise ValueError(
            f"cannot merge: timesteps {first.timesteps.tolist()} and {second.timesteps.tolist()} differ; "
            f"collect both with the same scheduler and number of steps"
        )
    if first.num_latents != second.num_latents:
        raise ValueError(
            f"cannot merge: {first.num_latents} and {second.num_latents} latents; one SAE per dictionary"
        )
