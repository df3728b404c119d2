"""Activations with known concepts, made shard by shard, and the SAE that reads them."""

import torch

from lbdt.activations import InMemory, Shard, Site, Source
from lbdt.sae import SAEConfig, SparseAutoencoder

SITE = Site("unet.up_blocks.1.attentions.1")
CONCEPTS = ("Cats", "Dogs", "Trees")
STYLES = ("Sketch", "Crayon")
TIMESTEPS = (901, 501, 1)
WIDTH, LATENTS, PATCHES = 8, 24, 6


def make_sae(activation="topk", latents=LATENTS, width=WIDTH, update=False):
    """Latents 0 to 7 read one coordinate each, the others random directions."""
    k = 5 if activation in ("topk", "topk_sigmoid") else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sae = SparseAutoencoder(
            SAEConfig(d_in=width, num_latents=latents, k=k, activation=activation, update=update)
        )
    sae.requires_grad_(False)
    sae.encoder.weight[: min(WIDTH, width)] = torch.eye(width)[:WIDTH]
    return sae


def made(first, prompts, width=WIDTH, patches=PATCHES):
    """Prompts `first`, ...: concept n % 3 (every seventh prompt: none) is strong in coordinate n on half of the
    patches; style n % 2."""
    parts, concept, style = [], [], []
    for number in range(first, first + prompts):
        generator = torch.Generator().manual_seed(number)
        x = torch.rand(len(TIMESTEPS), patches, width, generator=generator)
        x[:, ::2, number % 3] += 3 + torch.rand(1, generator=generator)
        parts.append(x.half())
        concept.append(-1 if number % 7 == 6 else number % 3)
        style.append(number % 2)
    return torch.stack(parts), torch.tensor(concept), torch.tensor(style)


def in_memory(prompts=20, prompts_per_shard=4, first=0, x=None):
    given, concept, style = made(first, prompts)
    return InMemory(
        given if x is None else x,
        site=SITE,
        timesteps=TIMESTEPS,
        concepts=CONCEPTS,
        concept=concept,
        styles=STYLES,
        style=style,
        prompts_per_shard=prompts_per_shard,
    )


class Lazy(Source):
    """A source that makes a shard whenever it is asked for it, at an output and an update; counts the requests."""

    concepts, styles, timesteps = CONCEPTS, STYLES, TIMESTEPS

    def __init__(self, prompts=20, prompts_per_shard=4, width=WIDTH, patches=PATCHES):
        self.sites = (SITE, Site(SITE.hookpoint, "update"))
        self.prompts, self.prompts_per_shard = prompts, prompts_per_shard
        self._sizes = {"width": width, "patches": patches}
        self.asked = []

    def origin(self):
        return {"prompts": self.prompts, "prompts_per_shard": self.prompts_per_shard, **self._sizes}

    def width(self, site):
        return self._sizes["width"]

    def patches(self, site):
        return self._sizes["patches"]

    def shard(self, index, site):
        self.asked.append((index, site))
        first = index * self.prompts_per_shard
        count = min(self.prompts_per_shard, self.prompts - first)
        x, concept, style = made(first, count, **self._sizes)
        x = x + 100 if site.update else x
        patches = torch.arange(x.shape[2], dtype=torch.int32).expand(x.shape[:3])
        return Shard(x, patches, concept, style)


def dense(sae, x):
    """Every latent's activation, [..., L]."""
    code = sae.encode(x.float())
    z = torch.zeros(*code.values.shape[:-1], sae.config.num_latents)
    return z.scatter_(-1, code.indices, code.values)
