"""Bad input to ConceptEraser: refused before anything is changed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser
from lbdt.sae import SAEConfig, SparseAutoencoder
from tests import toy
from tests.repeats import repeats


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


REFUSED = {
    "unknown concept": (lambda p: toy.eraser().attach(p, ["cat"]), "did you mean 'Cats'.*Cats, Dogs, Trees"),
    "concept in a set": (lambda p: toy.eraser().attach(p, [["Cats"], ["Birds"]]), "unknown concept 'Birds'"),
    "a name alone": (lambda p: toy.eraser().attach(p, "Cats"), "expected a list of names"),
    "no concept": (lambda p: toy.eraser().attach(p, []), "empty list"),
    "unknown hookpoint": (
        lambda p: toy.eraser(hookpoint="unet.up_blocks.0.attention.0").attach(p, ["Cats"]),
        r"did you mean 'unet\.up_blocks\.0\.attentions\.0'\? .*unet\.mid_block\.attentions\.0",
    ),
    "the UNet itself": (lambda p: toy.eraser(hookpoint="unet").attach(p, ["Cats"]), "no block 'unet'"),
    "a list of blocks": (lambda p: toy.eraser(hookpoint="unet.up_blocks").attach(p, ["Cats"]), "no block"),
    "unknown detect_at": (
        lambda p: toy.eraser(detect_at="unet.x").attach(p, ["Cats"]),
        "detect_at: .*no block",
    ),
    "SAE of another width": (lambda p: toy.eraser(width=8).attach(p, ["Cats"]), "32 channels.*trained on 8"),
    "a weight of NaN": (
        lambda p: with_weight("encoder.weight", float("nan")).attach(p, ["Cats"]),
        "sae: .*its encoder.weight",
    ),
    "an infinite bias": (
        lambda p: with_weight("encoder.bias", float("inf")).attach(p, ["Cats"]),
        "sae: .*its folded bias",
    ),
    "negative padding": (lambda p: toy.eraser(padding=-1), "padding: expected an integer >= 0, got -1"),
    "huge padding": (
        lambda p: toy.eraser(padding=2**63),
        "padding: expected an integer <= 65535, got 9223372036854775808",
    ),
    "padding set later": (lambda p: changed("padding", -1).attach(p, ["Cats"]), "padding"),
    "fractional padding": (lambda p: toy.eraser(padding=0.5), "padding"),
    "source": (lambda p: toy.eraser(source="noise"), "random, nearest, mean, row; got 'noise'"),
    "target": (lambda p: toy.eraser(target="input"), "output, update; got 'input'"),
    "selection": (lambda p: toy.eraser(selection={"topk": 1}), "unknown key topk.*top_k"),
    "rows": (lambda p: toy.eraser().attach(p, ["Cats"], rows="uncond"), "all, cond; got 'uncond'"),
    "empty window": (lambda p: toy.eraser().attach(p, ["Cats"], steps=(3, 3)), "first < last"),
    "one step": (lambda p: toy.eraser().attach(p, ["Cats"], steps=3), "two integers"),
    "seed": (lambda p: toy.eraser().attach(p, ["Cats"], seed=1.5), "seed"),
    "seed too large": (lambda p: toy.eraser().attach(p, ["Cats"], seed=2**64), "64-bit"),
    "no pipeline": (lambda p: toy.eraser().attach(p.unet, ["Cats"]), "expected a diffusers pipeline"),
    "no UNet": (lambda p: toy.eraser().attach(without_unet(), ["Cats"]), "has no UNet.*transformer, vae"),
}


def with_weight(name, value):
    """An eraser with one weight of its SAE like this."""
    eraser = toy.eraser()
    with torch.no_grad():
        eraser.sae.get_parameter(name).view(-1)[3] = value
    return eraser


def changed(name, value):
    eraser = toy.eraser()
    setattr(eraser, name, value)
    return eraser


def without_unet():
    from diffusers import DiffusionPipeline

    class TransformerPipeline(DiffusionPipeline):
        def __init__(self):
            super().__init__()

        @property
        def components(self):
            return {"vae": None, "transformer": None}

    return TransformerPipeline()


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_changed(pipe, case):
    attempt, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        attempt(pipe)
    assert toy.traces(pipe) == []


def test_a_second_attachment_of_the_same_eraser_is_refused(pipe):
    eraser, base = toy.eraser(), toy.images(pipe)
    with eraser.attach(pipe, ["Cats"]):
        first = toy.images(pipe)
        with pytest.raises(ValueError, match="attached to this pipeline already"):
            eraser.attach(pipe, ["Dogs"])
        assert repeats(toy.images(pipe), first)
    assert repeats(toy.images(pipe), base)


def test_sizes_must_agree():
    parts = toy.eraser()
    other = SparseAutoencoder(SAEConfig(d_in=toy.WIDTH, num_latents=32, activation="relu"))
    with pytest.raises(ValueError, match="made with an SAE of 64 latents, but the given SAE has 32"):
        ConceptEraser(other, parts.dictionary, toy.HOOKPOINT)
    with pytest.raises(TypeError, match="sae: expected"):
        ConceptEraser(None, parts.dictionary, toy.HOOKPOINT)
    with pytest.raises(TypeError, match="dictionary: expected"):
        ConceptEraser(parts.sae, None, toy.HOOKPOINT)
    with pytest.raises(ValueError, match="never attached"):
        parts.report()
    bank = ConceptDictionary(
        toy.CONCEPTS, toy.TIMESTEPS, parts.dictionary.mean, parts.dictionary.counts, bank=torch.zeros(4, 2, 7)
    )
    with pytest.raises(ValueError, match="bank holds embeddings of width 7"):
        ConceptEraser(parts.sae, bank, toy.HOOKPOINT)


def test_damaged_folders_are_refused(tmp_path):
    def damaged(name):
        toy.eraser().save_pretrained(tmp_path / name)
        (tmp_path / name / "digests.json").unlink()  # as of an older version: what it refuses comes first
        return tmp_path / name

    config = damaged("key") / "eraser.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"strength": 2}))
    nan = damaged("nan") / "sae" / "sae.safetensors"
    tensors = load_file(nan)
    tensors["encoder.weight"][0, 0] = float("nan")
    save_file(tensors, nan)
    missing = damaged("missing") / "sae" / "sae.safetensors"
    save_file({"encoder.weight": tensors["encoder.weight"]}, missing)
    short = damaged("short") / "dictionary" / "dictionary.safetensors"
    short.write_bytes(short.read_bytes()[:-100])
    padding = damaged("padding") / "eraser.json"
    padding.write_text(json.dumps(json.loads(padding.read_text()) | {"padding": -2}))
    (damaged("gone") / "eraser.json").unlink()
    for name, message in {
        "key": "unknown: strength",
        "nan": "encoder.weight.*NaN",
        "missing": "missing tensor",
        "short": "truncated or damaged",
        "padding": "eraser.json: padding: expected an integer >= 0",
        "gone": "eraser.json",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            ConceptEraser.from_pretrained(tmp_path / name)
