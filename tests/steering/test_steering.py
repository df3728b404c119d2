"""`Steering` on a real (tiny, random) StableDiffusionPipeline: removal, refusals, files, compiled UNets, hot path."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lbdt
from lbdt.editors import ConceptEraser, Steering
from lbdt.sae import SAEConfig, SparseAutoencoder
from tests import toy
from tests.repeats import repeats
from tests.steering import models

SETTINGS = [
    pytest.param({"rule": "saeuron"}, {}, id="saeuron"),
    pytest.param({"rule": "saeuron", "error": "released"}, {"keep_masks": True}, id="released"),
    pytest.param({"rule": "gsae", "where": "detected"}, {"steps": (1, 3)}, id="gsae-detected-window"),
    pytest.param({"rule": "sdxl"}, {"rows": "cond"}, id="sdxl-cond"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(shared):
    """The shared pipeline, which every test must leave as it was."""
    yield shared
    assert toy.traces(shared) == []


def steering(k: int = 8, **settings) -> Steering:
    return Steering.from_eraser(toy.eraser(k=k), **{"strength": -2.0, **settings})


@pytest.mark.parametrize(("settings", "attach"), SETTINGS)
def test_it_changes_the_images_and_comes_off(pipe, settings, attach):
    base, state = toy.images(pipe), list(pipe.unet.state_dict())
    with steering(**settings).attach(pipe, ["Cats"], seed=[1, 2], **attach) as attached:
        changed = toy.images(pipe)
        assert repeats(toy.images(pipe), changed) and list(pipe.unet.state_dict()) == state
    assert not torch.equal(changed, base) and repeats(toy.images(pipe), base)
    assert attached.report().replaced > 0 and settings["rule"] in str(attached.report())
    if "keep_masks" in attach:
        assert attached.masks()[0].replaced.shape == (2, 4, 4)


@pytest.mark.parametrize("first", ["eraser", "steering"])
def test_beside_an_eraser_in_any_order(pipe, first):
    base = toy.images(pipe)
    handles = [toy.eraser().attach(pipe, ["Dogs"]), steering().attach(pipe, ["Cats"], stack=True)]
    both = toy.images(pipe)
    handles.pop(0 if first == "eraser" else 1).remove()
    one = toy.images(pipe)
    handles.pop().remove()
    assert not torch.equal(both, one) and repeats(toy.images(pipe), base)


def test_an_unfired_concept_changes_no_bit(pipe):
    base = toy.images(pipe)
    quiet = Steering.from_eraser(toy.eraser(k=8, threshold=100.0), strength=-20.0)
    with quiet.attach(pipe, ["Cats"]) as attached:
        assert repeats(toy.images(pipe), base)
    assert attached.report().detected == attached.report().replaced == 0


def changed(name, value) -> Steering:
    made = steering()
    setattr(made, name, value)
    return made


def without_decoder() -> Steering:
    eraser = toy.eraser()
    eraser.sae.W_dec = None
    return Steering.from_eraser(eraser, strength=-1.0)


REFUSED = {
    "no decoder": (lambda p: without_decoder(), r"no decoder.*decoder=True"),
    "rule": (lambda p: steering(rule="per"), "rule: expected one of saeuron, gsae, sdxl; got 'per'"),
    "rule set later": (lambda p: changed("rule", "x").attach(p, ["Cats"]), "rule"),
    "error": (lambda p: steering(error="none"), "corrected, released; got 'none'"),
    "released without the rule": (lambda p: steering(rule="sdxl", error="released"), "error: 'released'"),
    "released sigmoid": (
        lambda p: models.random_steering("topk_sigmoid", strength=-1.0, error="released"),
        "error: 'released' .*topk_sigmoid",
    ),
    "where": (lambda p: steering(rule="gsae", where="some"), "all, detected; got 'some'"),
    "where of saeuron": (lambda p: steering(where="detected"), "where: rule 'saeuron'"),
    "gsae of a relu SAE": (lambda p: steering(k=0, rule="gsae"), "topk_sigmoid or topk, got 'relu'"),
    "NaN": (lambda p: steering(strength=float("nan")), "finite number, got nan"),
    "text": (lambda p: steering(strength="-1"), "strength: expected a number"),
    "true": (lambda p: steering(strength=True), "strength: expected a number"),
    "no strengths": (lambda p: steering(strength={}), "empty dict"),
    "strength of a stranger": (lambda p: steering(strength={"Birds": 1.0}), "unknown concept 'Birds'"),
    "infinite for one": (lambda p: steering(strength={"Cats": float("inf")}), "inf for 'Cats'"),
    "concept without strength": (
        lambda p: steering(strength={"Cats": -1.0}).attach(p, ["Dogs"]),
        "strength: none for 'Dogs'; given for Cats",
    ),
    "unknown concept": (lambda p: steering().attach(p, ["cat"]), "did you mean 'Cats'"),
    "unknown hookpoint": (lambda p: changed("hookpoint", "unet.x").attach(p, ["Cats"]), "no block 'unet.x'"),
    "width": (
        lambda p: Steering.from_eraser(toy.eraser(width=8), strength=-1.0).attach(p, ["Cats"]),
        "32 channels.*trained on 8",
    ),
    "rows": (lambda p: steering().attach(p, ["Cats"], rows="uncond"), "all, cond; got 'uncond'"),
    "window": (lambda p: steering().attach(p, ["Cats"], steps=(3, 3)), "first < last"),
    "seed": (lambda p: steering().attach(p, ["Cats"], seed=1.5), "seed"),
    "selection": (lambda p: steering(selection={"topk": 1}), "unknown key topk"),
    "never attached": (lambda p: steering().report(), "never attached"),
    "no pipeline": (lambda p: steering().attach(p.unet, ["Cats"]), "expected a diffusers pipeline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_changed(pipe, case):
    attempt, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        attempt(pipe)
    assert toy.traces(pipe) == []


def test_a_second_attachment_is_refused(pipe):
    made = steering()
    with (
        made.attach(pipe, ["Cats"]),
        pytest.raises(ValueError, match="this steering is attached to this pipeline already"),
    ):
        made.attach(pipe, ["Dogs"])


def test_a_list_of_another_length_is_refused_before_anything_is_generated(pipe):
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    with steering().attach(pipe, [["Cats"]] * 3), pytest.raises(ValueError, match="list of 3 entries"):
        toy.images(pipe)
    handle.remove()
    assert calls == []


def test_files_keep_everything(pipe, tmp_path):
    made = steering(strength={"Cats": -3.0, "Dogs": -1.0}, error="released")
    made.save_pretrained(tmp_path / "steering")
    loaded = lbdt.Steering.from_pretrained(tmp_path / "steering")
    assert repr(loaded) == repr(made) and loaded.selection == {"top_k": 1}
    with made.attach(pipe, ["Cats"]):
        expected = toy.images(pipe)
    with loaded.attach(pipe, ["Cats"]):
        assert repeats(toy.images(pipe), expected)
    other = Steering.from_pretrained(tmp_path / "steering", rule="sdxl", error="corrected", strength=-1.0)
    assert (other.rule, other.strength) == ("sdxl", -1.0)


def test_a_file_that_does_not_know_units_counts_as_it_did(tmp_path):
    steering(rule="sdxl", strength=-3.0).save_pretrained(tmp_path)
    path = tmp_path / "steering.json"
    stored = json.loads(path.read_text())
    assert stored.pop("unit") == "active"
    path.write_text(json.dumps(stored))
    assert Steering.from_pretrained(tmp_path).unit == "patches"
    assert Steering.from_pretrained(tmp_path, unit="active").unit == "active"


def test_an_erasers_folder_serves_both(pipe, tmp_path):
    eraser = toy.eraser(k=8, padding=0, detect_at=toy.DETECT_AT)
    eraser.save_pretrained(tmp_path, decoder=True)
    with pytest.raises(ValueError, match=r"eraser\.json: an eraser's folder has no strength"):
        Steering.from_pretrained(tmp_path)
    loaded = Steering.from_pretrained(tmp_path, strength=-2.0)
    # The SAE belongs to the block that it looks at.
    assert loaded.hookpoint == Steering.from_eraser(eraser, strength=-2.0).hookpoint == toy.DETECT_AT
    loaded.save_pretrained(tmp_path)
    again = ConceptEraser.from_pretrained(tmp_path)
    assert (again.padding, again.detect_at) == (0, toy.DETECT_AT) and again.sae.W_dec is not None
    assert Steering.from_pretrained(tmp_path).strength == -2.0
    for name, text, message in (
        ("steering.json", "[]", "JSON object"),
        ("steering.json", json.dumps({"version": 9}), "version 1, got 9"),
        ("steering.json", json.dumps({"version": 1, "gamma": 2}), "gamma"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"steering\.json: .*{message}"):
            Steering.from_pretrained(tmp_path)


def test_a_decoder_that_is_not_there_cannot_be_saved(tmp_path):
    eraser = toy.eraser()
    eraser.save_pretrained(tmp_path / "lean")
    lean = ConceptEraser.from_pretrained(tmp_path / "lean")
    with pytest.raises(ValueError, match="decoder: .*without W_dec"):
        lean.save_pretrained(tmp_path / "other", decoder=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="no decoder"):
        Steering.from_pretrained(tmp_path / "lean", strength=-1.0)


@pytest.mark.parametrize(("settings", "attach"), SETTINGS)
def test_it_runs_on_tensors_without_values(settings, attach):
    """Under fake tensors an op that would look at a value, or shape its output by one, raises."""
    pipe = toy.EchoPipe(models.SIZE, guided=True)
    made = models.random_steering("topk_update", strength=-1.0, **settings)
    with made.attach(pipe, ["Cats", "Dogs"], layout=pipe.layout, **attach) as attached:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = [torch.full((4,), 666), models.maps(4), models.maps(4, seed=1)]
            (out,) = pipe.unet(*(mode.from_tensor(tensor) for tensor in given))
        assert tuple(out.shape) == (4, models.SIZE, 3, 4)
        assert attached.report().steps == ()


@pytest.mark.parametrize(("settings", "attach"), SETTINGS)
def test_a_compiled_block(settings, attach):
    pipe = toy.EchoPipe(models.SIZE, guided=True)
    made = models.random_steering("topk_update", strength=-1.0, **settings)
    calls = [(torch.full((4,), t), models.maps(4, seed=t), models.maps(4, seed=t + 1)) for t in toy.TIMESTEPS]
    with torch.no_grad(), made.attach(pipe, [["Cats", "Dogs"], []], layout=pipe.layout, **attach) as attached:
        expected = [pipe.unet(*call)[0] for call in calls]
    reported = attached.report()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), made.attach(pipe, [["Cats", "Dogs"], []], layout=pipe.layout, **attach) as attached:
        assert all(repeats(compiled(*c)[0], e) for c, e in zip(calls, expected, strict=True))
    # All timesteps share one graph: nothing about a step is Python state.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert attached.report() == reported and reported.replaced > 0


def test_a_compiled_unet(tmp_path):
    pipe = toy.pipeline(tmp_path)
    made, base = steering(), toy.images(pipe)
    with made.attach(pipe, ["Cats"]):
        expected = toy.images(pipe)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    with made.attach(pipe, ["Cats"]):
        assert repeats(toy.images(pipe), expected)
    assert repeats(toy.images(pipe), base)


def test_an_sae_of_another_dictionary_is_refused():
    other = SparseAutoencoder(SAEConfig(d_in=toy.WIDTH, num_latents=16, activation="relu"))
    with pytest.raises(ValueError, match="made with an SAE of 64 latents, but the given SAE has 16"):
        Steering(other, toy.eraser().dictionary, toy.HOOKPOINT, strength=-1.0)
