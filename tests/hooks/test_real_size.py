"""One denoising step of UNets of the published sizes, with random weights in float32: the eraser's masks are those of
the literal computation. `pytest -m real_size tests/hooks/test_real_size.py`."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser
from lbdt.sae import SAEConfig, SparseAutoencoder

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CASES = {
    "sd15": (SD15, "unet.up_blocks.1.attentions.1", 20480, 32, False, {}),
    "sdxl": (
        SDXL,
        "unet.up_blocks.0.attentions.1",
        5120,
        10,
        True,
        {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}},
    ),
}
TIME = 500


def random_unet(config: dict) -> nn.Module:
    """One with weights that are drawn at once, which is faster than the layers' own initialisation."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=g)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    return unet.eval().requires_grad_(False)


def random_eraser(hookpoint: str, latents: int, k: int, update: bool, seen: Tensor) -> ConceptEraser:
    """Of an SAE with random weights; the concept's four latents pass their thresholds in a part of the patches
    `seen`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sae = SparseAutoencoder(
            SAEConfig(d_in=1280, num_latents=latents, activation="topk", k=k, update=update)
        )
    sae.requires_grad_(False)
    h = sae.pre_activations(seen)
    own = h.max(0).values.topk(4).indices
    mean = torch.zeros(1, 2, latents)
    mean[0, :, own] = h[:, own].quantile(0.5, dim=0).clamp(min=1e-3)
    counts = torch.ones(1, 2, dtype=torch.int64)
    dictionary = ConceptDictionary(("Cats",), (999, 1), mean, counts)
    return ConceptEraser(sae, dictionary, hookpoint, padding=0, selection={"top_k": 4})


def literal(eraser: ConceptEraser, seen: Tensor) -> Tensor:
    """Every latent of every patch, the k largest kept, and the concept's among these above their thresholds."""
    sae, chosen = eraser.sae, eraser.select("Cats")
    h = sae.pre_activations(seen)
    kept = torch.zeros_like(h, dtype=torch.bool).scatter_(1, h.topk(sae.rank_k, dim=1).indices, True)
    bin = int((eraser.dictionary.timesteps.float() - TIME).abs().argmin())
    return (
        (kept & (h > 0))[:, chosen.latents].logical_and(h[:, chosen.latents] > chosen.thresholds[bin]).any(1)
    )


@pytest.mark.real_size
@pytest.mark.parametrize("case", CASES)
def test_the_masks_of_one_step_are_the_literal_ones(case):
    config, hookpoint, latents, k, update, more = CASES[case]
    unet = random_unet(config)
    block = unet.get_submodule(hookpoint.removeprefix("unet."))
    g = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 64, 64, generator=g)
    text = torch.randn(1, 77, config["cross_attention_dim"], generator=g)
    seen: list[Tensor] = []

    def look(module, args, kwargs, output):
        x = output[0] if isinstance(output, tuple) else output.sample
        seen.append((x - args[0] if update else x).flatten(2)[0].t())

    def step():
        with torch.inference_mode():
            return unet(sample, TIME, encoder_hidden_states=text, **more).sample

    handle = block.register_forward_hook(look, with_kwargs=True)
    base = step()
    handle.remove()
    eraser = random_eraser(hookpoint, latents, k, update, seen[0])
    expected = literal(eraser, seen[0])
    pipe = SimpleNamespace(unet=unet, components={"unet": unet})
    with eraser.attach(pipe, ["Cats"], layout=("cond",), keep_masks=True) as attached:
        out = step()
        mask = attached.masks()[0].detected.flatten()
    print(f"{case}: {int(mask.sum())} of {mask.numel()} patches")
    assert 0 < int(expected.sum()) < expected.numel()
    assert torch.equal(mask, expected)
    assert not torch.equal(out, base) and torch.equal(step(), base)
