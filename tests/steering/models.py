"""SAEs and dictionaries for the steering tests, and the released hook written out from METHOD.md, 5.1."""

import torch

from lbdt.dictionary import ConceptDictionary, Selection
from lbdt.editors import Steering
from lbdt.sae import SAEConfig, SparseAutoencoder
from tests import toy

# The edit is a product with encoder rows, then one with decoder rows: encode_topk's tolerances hold.
QUANTITY = "encode_topk"
WIDTH = 4
SIZE, LATENTS = 8, 32
KINDS = ("topk", "topk_sigmoid", "relu", "jumprelu", "batch_topk", "topk_update", "relu_update")


def dials(**settings) -> Steering:
    """Latent i reads channel i and writes twice channel i; concept i: above 0.5, mean 1.5."""
    update, k = settings.pop("update", False), settings.pop("k", None)
    kind = {"activation": "topk", "k": k} if k else {"activation": "relu"}
    eraser = toy.eraser(width=WIDTH, latents=WIDTH, threshold=0.5, hookpoint="unet.block", update=update)
    sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, num_latents=WIDTH, update=update, **kind)).requires_grad_(
        False
    )
    sae.encoder.weight.copy_(torch.eye(WIDTH))
    sae.W_dec.copy_(2 * torch.eye(WIDTH))
    return Steering(sae, eraser.dictionary, "unet.block", selection={"top_k": 1}, **settings)


def sharing(high: bool = False, **settings) -> Steering:
    """`dials` whose Cats and Dogs both own latent 0, with means 1.5 there; `high`: Dogs' threshold is 3."""
    steering = dials(k=2, **settings)
    steering.dictionary.mean[1] = steering.dictionary.mean[0]
    thresholds = {"Cats": 0.5, "Dogs": 3.0 if high else 0.5}
    steering.select = lambda name: Selection(
        torch.tensor([0]), torch.full((4, 1), thresholds[name]), name, "published"
    )
    return steering


def random_steering(case: str, threshold: float = 0.4, **settings) -> Steering:
    """Random weights of 32 latents of width 8, 4 kept; each concept has latents of its own, two a bin."""
    kind = case.removesuffix("_update")
    extra = {"k": 4} if kind in ("topk", "topk_sigmoid", "batch_topk") else {}
    if kind == "batch_topk":
        extra["threshold"] = 0.3
    config = SAEConfig(
        d_in=SIZE, num_latents=LATENTS, activation=kind, update=case.endswith("_update"), **extra
    )
    generator = torch.Generator().manual_seed(3)
    sae = SparseAutoencoder(config).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    if kind == "jumprelu":
        sae.theta.copy_(torch.rand(LATENTS, generator=generator))
    count = len(toy.CONCEPTS)
    mean = torch.rand(count, len(toy.TIMESTEPS), LATENTS, generator=generator) * 0.01
    for concept in range(count):
        for bin in range(len(toy.TIMESTEPS)):
            # Latents move with the bin, so a wrong bin is seen.
            own = [4 * concept + bin, 16 + 4 * concept + bin]
            mean[concept, bin, own] = threshold * count * torch.tensor([1.0, 1.5])
    counts = torch.ones(count, len(toy.TIMESTEPS), dtype=torch.int64)
    fired = torch.arange(1, LATENTS + 1)
    dictionary = ConceptDictionary(toy.CONCEPTS, toy.TIMESTEPS, mean, counts, fired=fired)
    return Steering(sae, dictionary, "unet.block", selection={"top_k": 2}, **settings)


def maps(rows: int, seed: int = 0) -> torch.Tensor:
    """[rows, 8, 3, 4]."""
    return torch.randn(rows, SIZE, 3, 4, generator=torch.Generator().manual_seed(seed)) * 1.5


def dense_code(sae: SparseAutoencoder, patch: torch.Tensor) -> torch.Tensor:
    """z [L] of one patch [d]: METHOD.md, 2.1, term by term."""
    h = sae.encoder.weight @ (patch - sae.b_dec) + sae.encoder.bias
    kind = sae.config.activation
    if kind in ("topk", "topk_sigmoid"):
        kept = h.topk(sae.config.k).indices
        z = torch.zeros_like(h)
        z[kept] = h[kept].relu() if kind == "topk" else h[kept].sigmoid()
        return z
    floor = {"relu": 0.0, "jumprelu": getattr(sae, "theta", None), "batch_topk": sae.config.threshold}[kind]
    return torch.where(h > floor, h, 0.0)


def released_loop(
    steering: Steering, x: torch.Tensor, concepts: list[str], timestep: int, given: torch.Tensor
):
    """Image by image and patch by patch: encode, compare with the mean over concepts, scale, decode, and add
    (decode(z) - x). Returns the new map, and where a latent passed [B, N]."""
    sae, mean = steering.sae, steering.dictionary.mean
    bin = toy.TIMESTEPS.index(timestep)
    out, fires = x.clone().flatten(2), torch.zeros(x.shape[0], x.shape[2] * x.shape[3], dtype=torch.bool)
    start = given.flatten(2) if sae.config.update else torch.zeros_like(out)
    looked = out - start
    for b in range(x.shape[0]):
        for n in range(out.shape[2]):
            patch = looked[b, :, n].clone()
            z = dense_code(sae, patch)
            edited = z.clone()
            for concept in concepts:
                c = steering.dictionary.index(concept)
                score = steering.dictionary.scores()[c, bin]
                for i in score.topk(2).indices.tolist():
                    if z[i] > mean[:, bin, i].mean():
                        fires[b, n] = True
                        edited[i] = z[i] * steering.strength * mean[c, bin, i]
            recon, new = (code @ sae.W_dec + sae.b_dec for code in (z, edited))
            out[b, :, n] = start[b, :, n] + new + (recon - patch)
    return out.view_as(x), fires
