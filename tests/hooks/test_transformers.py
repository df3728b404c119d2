"""Denoisers that are transformers: collect, score, erase and steer on the three pipelines that are known."""

import pytest
import torch

from lbdt.activations.generated import Generated
from lbdt.activations.prompts import Prompt
from lbdt.activations.sites import Site
from lbdt.dictionary.scoring import score
from lbdt.editors import ConceptEraser, Steering
from lbdt.hooks import lookup
from lbdt.sae import SAEConfig, SparseAutoencoder
from tests import tiny_pipelines as tiny
from tests import toy
from tests.repeats import matches, repeats

CASES = {
    "sd3-joint": ("sd3", "transformer.transformer_blocks.0", "output"),
    "sd3-update": ("sd3", "transformer.transformer_blocks.0", "update"),
    "flux-joint": ("flux", "transformer.transformer_blocks.0", "output"),
    "flux-single": ("flux", "transformer.single_transformer_blocks.0", "output"),
    "pixart": ("pixart", "transformer.transformer_blocks.0", "output"),
}
PROMPTS = [
    Prompt(text, name, None, n) for n, (text, name) in enumerate((("cat", "Cats"), ("dog", "Dogs")) * 2)
]


def scored(pipe, site: Site):
    """An SAE of random weights whose latents fire often, and its dictionary of the pipeline's own activations."""
    call = tiny.arguments(pipe, ["cat"])
    fixed = ("height", "width", "max_sequence_length", "use_resolution_binning", "clean_caption")
    source = Generated(
        pipe,
        PROMPTS,
        [site] if not site.update else [site, Site(site.hookpoint)],
        steps=3,
        guidance=4.0,
        prompts_per_shard=2,
        dtype=torch.float32,
        call={name: call[name] for name in fixed if name in call},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = SAEConfig(d_in=tiny.WIDTH, num_latents=64, activation="relu", update=site.update)
        sae = SparseAutoencoder(config).requires_grad_(False)
    dictionary = score(source, site, sae, candidates=2, bank=4, picture_false_positive=None, progress=False)
    assert dictionary.concepts == ("Cats", "Dogs") and list(dictionary.timesteps) == list(source.timesteps)
    return sae, dictionary


@pytest.mark.parametrize(("key", "hookpoint", "kind"), CASES.values(), ids=CASES)
def test_what_is_collected_is_scored_erased_and_steered(key, hookpoint, kind, tmp_path):
    pipe = tiny.BUILD[key](tmp_path)
    base = tiny.run(pipe)
    sae, dictionary = scored(pipe, Site(hookpoint, kind))
    settings = {"selection": {"top_k": 1, "thresholds": "published"}}
    for editor in (
        ConceptEraser(sae, dictionary, hookpoint, padding=0, **settings),
        Steering(sae, dictionary, hookpoint, strength=-5.0, **settings),
    ):
        with editor.attach(pipe, [["Cats"], []], keep_masks=True) as handle:
            out = tiny.run(pipe)
            report, masks = handle.report(), handle.masks()
        assert len(report.steps) == 3 and report.detected > 0 and report.replaced > 0
        assert masks[0].detected.shape == (2, 4, 4) and not any(mask.detected[1].any() for mask in masks)
        assert matches(out, base).flatten(1).all(1).tolist() == [False, True]
        assert toy.traces(pipe) == [] and repeats(tiny.run(pipe), base)


def test_text_tokens_keep_their_bits(tmp_path):
    pipe = tiny.BUILD["sd3"](tmp_path)
    hookpoint = CASES["sd3-joint"][1]
    sae, dictionary = scored(pipe, Site(hookpoint))
    block, seen = pipe.transformer.transformer_blocks[0], []
    eraser = ConceptEraser(sae, dictionary, hookpoint, selection={"top_k": 1, "thresholds": "published"})
    for attached in (False, True):
        handle = eraser.attach(pipe, ["Cats"]) if attached else None
        hook = block.register_forward_hook(lambda module, args, output: seen.append(output))
        tiny.run(pipe, num_inference_steps=1)
        hook.remove()
        if handle is not None:
            assert handle.report().replaced > 0
            handle.remove()
    (text, image), (text_after, image_after) = seen
    assert matches(text_after, text).all() and not matches(image_after, image).all()


@pytest.mark.parametrize(
    ("key", "size", "grid"),
    [("sd3", (16, 32), (4, 8)), ("flux", (16, 32), (4, 8)), ("pixart", (32, 16), (8, 4))],
)
def test_a_map_that_is_not_square_has_its_grid_from_the_latents(key, size, grid, tmp_path):
    pipe = tiny.BUILD[key](tmp_path)
    hookpoint = CASES[{"sd3": "sd3-joint", "flux": "flux-single"}.get(key, key)][1]
    sae, dictionary = scored(pipe, Site(hookpoint))
    eraser = ConceptEraser(sae, dictionary, hookpoint, selection={"top_k": 1, "thresholds": "published"})
    with eraser.attach(pipe, ["Cats"], keep_masks=True) as handle:
        tiny.run(pipe, height=size[0], width=size[1])
        assert handle.masks()[0].detected.shape == (2, *grid)


def test_a_transformer_that_is_not_known_is_refused(tmp_path):
    pipe = tiny.BUILD["sd3"](tmp_path)

    class Other(type(pipe.transformer)):
        pass

    pipe.transformer.__class__ = Other
    with pytest.raises(
        ValueError, match="how Other is called.*SD3Transformer2DModel, FluxTransformer2DModel"
    ):
        lookup.find_denoiser(pipe)


def test_a_block_is_looked_for_in_the_component_that_denoises(tmp_path):
    pipe = tiny.BUILD["sd3"](tmp_path)
    eraser = toy.eraser(hookpoint="unet.up_blocks.0.attentions.0")
    with pytest.raises(ValueError, match="the transformer has no block.*transformer.transformer_blocks.0"):
        eraser.attach(pipe, ["Cats"])
