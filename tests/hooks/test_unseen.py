"""What an attachment could not look at, or for, is said: NaN and infinity, and concepts without any latent."""

import warnings

import pytest
import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser, Steering
from tests import toy

NAN, INF = float("nan"), float("inf")


def attached(kind: str, **settings):
    eraser = toy.eraser(hookpoint="unet.block", **settings)
    if kind == "per":
        return eraser
    return Steering.from_eraser(eraser, rule=kind, strength=-1.0)


def call(pipe, timestep: int, change: dict, dtype=torch.float32, seed: int = 0):
    """One UNet call of two rows of 4 x 5 patches, with values of the output (or the input) exchanged."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, toy.WIDTH, 4, 5)
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("output", "given")}
    for (name, *place), value in change.items():
        given[name][tuple(place)] = value
    pipe.unet(torch.full((2,), timestep), given["output"], given["given"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["per", "saeuron", "sdxl"])
def test_patches_that_are_not_finite_are_counted_by_step(kind, dtype):
    pipe = toy.EchoPipe(toy.WIDTH)
    with attached(kind).attach(pipe, ["Cats"]) as handle:
        call(pipe, 999, {("output", 0, 3, 1, 2): NAN, ("output", 1, 0, 0, 0): INF}, dtype)
        call(pipe, 999, {("output", 1, ..., 3, place): -INF for place in range(5)}, dtype)
        call(pipe, 333, {}, dtype)
        with pytest.warns(RuntimeWarning, match="7 patches of the hooked activation were NaN or infinite"):
            report = handle.report()
    assert [step.not_finite for step in report.steps] == [7, 0] and report.not_finite == 7
    assert report.to_dict()["not_finite"] == 7
    assert "7 patches NaN or infinite" in str(report).splitlines()[-2]


def test_large_values_are_not_taken_for_infinite_ones():
    pipe = toy.EchoPipe(toy.WIDTH)
    with attached("per").attach(pipe, ["Cats"]) as handle:
        call(pipe, 999, {("output", 0): 60000.0}, torch.float16)  # 32 of them overflow a half-precision sum
        call(pipe, 999, {("output", 0): 1e300}, torch.float64)
        assert handle.report().not_finite == 0


@pytest.mark.parametrize("name", ["output", "given"])
def test_an_update_is_looked_at_on_both_sides(name):
    pipe = toy.EchoPipe(toy.WIDTH)
    with attached("per", update=True).attach(pipe, ["Cats"]) as handle:
        call(pipe, 999, {(name, 0, 3, 1, 2): INF})
        with pytest.warns(RuntimeWarning, match="NaN or infinite"):
            assert handle.report().not_finite == 1


def test_the_pipelines_call_warns_at_its_end(tmp_path):
    """Half precision that overflows at one step of one picture; every call says so for itself."""
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    with eraser.attach(pipe, ["Cats"], on_failure="generate"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            toy.images(pipe, steps=1)
        block = pipe.unet.up_blocks[0].attentions[0]
        block.proj_out.weight.data.mul_(INF)
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="patches of the hooked activation were NaN or infinite"):
                toy.images(pipe, steps=1)
        with pytest.warns(RuntimeWarning, match="NaN or infinite"):
            assert eraser.report().not_finite > 0
    assert toy.traces(pipe) == []


def blinded(bins: list[int], **settings) -> ConceptEraser:
    """An eraser whose concept "Cats" fires at none of these bins."""
    eraser = toy.eraser(**settings)
    mean = eraser.dictionary.mean.clone()
    mean[0, bins] = 0
    dictionary = eraser.dictionary.replaced(mean=mean)
    return ConceptEraser(eraser.sae, dictionary, eraser.hookpoint, selection=eraser.selection)


@pytest.mark.parametrize("kind", ["per", "saeuron"])
def test_a_concept_without_a_latent_at_some_timesteps_is_told(kind):
    pipe = toy.EchoPipe(toy.WIDTH)
    eraser = blinded([1, 3], hookpoint="unet.block")
    chosen = eraser if kind == "per" else Steering.from_eraser(eraser, rule=kind, strength=-1.0)
    with pytest.warns(RuntimeWarning, match=r"not looked for: 'Cats' at 666, 1 \(timesteps\)") as told:
        handle = chosen.attach(pipe, ["Cats", "Dogs"])
    assert len(told) == 1
    with handle:
        for timestep in (999, 640, 2):
            call(pipe, timestep, {})
        report = chosen.report()
    assert [step.blind for step in report.steps] == [(), ("Cats",), ("Cats",)]
    assert report.to_dict()["steps"][1]["blind"] == ("Cats",)
    assert str(report).splitlines()[-1].endswith("no latent of Cats")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen.attach(pipe, ["Dogs"]).remove()


@pytest.mark.parametrize("kind", ["per", "saeuron", "gsae"])
def test_a_concept_without_a_latent_at_all_is_refused(kind):
    """A sigmoid never passes 1, so thresholds of 1 are infinite on pre-activations, though latents are selected."""
    pipe = toy.EchoPipe(toy.WIDTH)
    parts = toy.eraser(hookpoint="unet.block", k=4)
    mean = torch.zeros_like(parts.dictionary.mean)
    mean[torch.arange(3), :, torch.arange(3)] = 3.0
    dictionary = ConceptDictionary(toy.CONCEPTS, toy.TIMESTEPS, mean, parts.dictionary.counts)
    parts.sae.config = type(parts.sae.config)(**{**vars(parts.sae.config), "activation": "topk_sigmoid"})
    chosen = ConceptEraser(parts.sae, dictionary, "unet.block", selection={"top_k": 1})
    if kind != "per":
        chosen = Steering.from_eraser(chosen, rule=kind, strength=-1.0)
    with pytest.raises(ValueError, match="no latent of 'Cats' can be detected at any timestep"):
        chosen.attach(pipe, ["Cats"])
    assert toy.traces(pipe) == []


def test_no_latent_selected_at_any_timestep_is_refused():
    with pytest.raises(ValueError, match="no latent of 'Cats' passes the criterion at any timestep"):
        blinded([0, 1, 2, 3], hookpoint="unet.block").attach(toy.EchoPipe(toy.WIDTH), ["Cats"])
