"""How often a dictionary detects its concepts on held-out activations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lbdt.activations.source import shard_count
from lbdt.dictionary.encoding import Encoder, check_fit, detected, labels, labels_of
from lbdt.runs.site_names import may_be

if TYPE_CHECKING:
    from lbdt.activations import Site, Source
    from lbdt.dictionary.concept_dictionary import ConceptDictionary
    from lbdt.sae import SparseAutoencoder


def selectivity(
    source: Source,
    site: Site,
    sae: SparseAutoencoder,
    dictionary: ConceptDictionary,
    *,
    by: str = "concepts",
    progress: bool = False,
    **select: Any,
) -> Tensor:
    """Share of patches detected in images [with, without] a concept per timestep of the source, mean over the concepts
    that source and dictionary have in common: [T, 2] float64.

    Detected by any latent of `dictionary.select(concept, **select)` at the nearest timestep. "Without" is every image
    with another label; images without a label are left out. One shard is in memory at a time.

    Raises:
        ValueError: an SAE or dictionary of another site, a concept in common without images of it or of others, no
            concept in common, a bad selection.
    """
    names = labels(source, by)
    check_fit(source, site, sae)
    if sae.config.num_latents != dictionary.num_latents:
        raise ValueError(
            f"dictionary: made with an SAE of {dictionary.num_latents} latents, but the given SAE has "
            f"{sae.config.num_latents}"
        )
    if not may_be(dictionary.site, str(site)):
        raise ValueError(f"dictionary: made at {dictionary.site}, and the activations are those of {site}")
    known = [name for name in names if name in dictionary.concepts]
    if not known:
        raise ValueError(
            f"the activations' {by} {', '.join(names)} are none of the dictionary's {', '.join(dictionary.concepts)}"
        )
    selections = [dictionary.select(name, **select) for name in known]
    bins = dictionary.nearest_bin(torch.tensor(source.timesteps)).tolist()
    hits = torch.zeros(len(known), len(bins), 2, dtype=torch.int64)
    patches = torch.zeros(len(known), 2, dtype=torch.int64)
    with Encoder(sae) as encoder:
        for index in tqdm(
            range(shard_count(source)), "selectivity", disable=not progress, unit="shard", file=sys.stderr
        ):
            shard = source.shard(index, site)
            label = labels_of(shard, by)
            own = torch.stack([label == names.index(name) for name in known])  # [C, P]
            groups = torch.stack([own, ~own & (label >= 0)], dim=2).long()  # [C, P, 2]
            patches += groups.sum(1) * shard.x.shape[2]
            for t, code in enumerate(encoder.codes(shard.x)):
                for place, selection in enumerate(selections):
                    found = detected(code, selection, bins[t], sae.config.num_latents).sum(-1)
                    hits[place, t] += found @ groups[place]
    empty = [name for name, counts in zip(known, patches, strict=True) if not counts.all()]
    if empty:
        raise ValueError(
            f"no images of {', '.join(empty)}, or none of others, among the held-out activations"
        )
    return (hits.double() / patches.unsqueeze(1)).mean(0)
