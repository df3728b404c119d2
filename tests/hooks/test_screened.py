"""An attached eraser with an int8 screen: pictures, masks and reports are those without one."""

import pytest
import torch

from lbdt import Steering, int8_screen
from lbdt.int8_screen import Screen, instructions
from tests import toy
from tests.backends import DEVICE, HAS_CPP
from tests.repeats import repeats

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="counts what is made and read on a CPU"),
    pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler"),
]


@pytest.fixture
def screened(monkeypatch):
    """Switches screens on, of however small a dictionary, or off; counts those that were made."""
    made = []
    of = Screen.of.__func__

    def counted(cls, *arguments):
        made.append(arguments)
        return of(cls, *arguments)

    monkeypatch.setattr(Screen, "of", classmethod(counted))
    # Whether this CPU has the instructions: without them C++ takes the screen, and leaves it aside.
    monkeypatch.setattr(int8_screen, "instructions", lambda: instructions() or "none")

    def switch(on):
        made.clear()
        monkeypatch.setattr(int8_screen, "_LEAST", 1 if on else 1 << 60)
        return made

    return switch


def run(pipe, eraser, concepts=("Cats",), **options):
    with eraser.attach(pipe, list(concepts), seed=3, keep_masks=True, **options) as handle:
        images = toy.images(pipe, seed=1)
        return images, handle.report()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"avoid": "known"}, id="known-concepts-are-no-donors"),
        pytest.param({"target": "update"}, id="update"),
        pytest.param({"min_patches": 3}, id="gate"),
        pytest.param({"detect_at": toy.DETECT_AT}, id="looks-elsewhere"),
    ],
)
def test_pictures_and_reports_are_those_without_a_screen(tmp_path, screened, settings):
    pipe = toy.pipeline(tmp_path)
    eraser = toy.eraser(**settings)
    found = []
    for on in (False, True):
        made = screened(on)
        found.append(run(pipe, eraser, ("Cats", "Dogs")))
        assert len(made) == on
    (plain, one), (screened_images, other) = found
    assert torch.equal(plain, screened_images)
    assert str(one) == str(other)


def test_a_compiled_unet_takes_the_screen_in_its_one_graph(tmp_path, screened):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    screened(False)
    plain, _ = run(pipe, eraser)
    made = screened(True)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    images, _ = run(pipe, eraser)
    assert len(made) == 1 and repeats(images, plain)


def test_other_concepts_are_exchanged_without_another_screen(tmp_path, screened):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    made = screened(True)
    with eraser.attach(pipe, ["Cats"], seed=3) as handle:
        handle.set(concepts=["Dogs"])
        dogs = toy.images(pipe, seed=1)
    assert len(made) == 1
    screened(False)
    assert torch.equal(dogs, run(pipe, eraser, ("Dogs",))[0])


def test_activations_of_another_dtype_have_a_screen_of_their_own(tmp_path, screened):
    found = []
    for on in (False, True):
        made = screened(on)
        pipe = toy.pipeline(tmp_path)
        with toy.eraser().attach(pipe, ["Cats"], seed=3):
            first = toy.images(pipe, seed=1)
            pipe.to(torch.bfloat16)
            second = toy.images(pipe, seed=1)
            pipe.to(torch.float32)
            found.append((first, second))
        assert len(made) == 2 * on and all(
            weight.dtype in (torch.float32, torch.bfloat16) for weight, *_ in made
        )
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def sae_of(eraser):
    return eraser.sae.encoder.weight


def test_the_encoder_is_read_where_it_lies(tmp_path, screened):
    """But where it is cast, or has no screen: then its rows are copied in the order in which they are read."""
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    for on in (True, False):
        screened(on)
        with eraser.attach(pipe, ["Cats"]):
            plan = toy.plan_of(pipe)
            assert (plan.weight.data_ptr() == sae_of(eraser).data_ptr()) is on
            assert (plan.screen[-1] is not None) is on
            pipe.to(torch.bfloat16)
            toy.images(pipe, seed=1)
            assert plan.weight.dtype == torch.bfloat16 and plan.screen[-1] is None
            pipe.to(torch.float32)
            toy.images(pipe, seed=1)
            assert (plan.weight.data_ptr() == sae_of(eraser).data_ptr()) is on


def write(eraser):
    with torch.no_grad():
        sae_of(eraser).mul_(2)


def write_uncounted(eraser):
    sae_of(eraser).data.mul_(2)


@pytest.mark.parametrize("written", [write, write_uncounted])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_encoder_that_is_written_to_meanwhile_is_refused(tmp_path, screened, compiled, written):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    screened(True)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    with eraser.attach(pipe, ["Cats"]) as handle:
        toy.images(pipe, seed=1)
        written(eraser)
        with pytest.raises(RuntimeError, match="written to .* attach again"):
            toy.images(pipe, seed=1)
        if written is write:
            with pytest.raises(RuntimeError, match="written to .* attach again"):
                handle.set(concepts=["Dogs"])
    with eraser.attach(pipe, ["Cats"], seed=3):
        toy.images(pipe, seed=1)


@pytest.mark.parametrize("on", [True, False], ids=["screened", "copied"])
@pytest.mark.parametrize("made", [toy.eraser, lambda: Steering.from_eraser(toy.eraser(), strength=-2.0)])
def test_after_a_write_no_other_dtype_is_made_of_it(tmp_path, screened, on, made):
    """The latents and thresholds of an attachment are those of the encoder as it was."""
    pipe, editor = toy.pipeline(tmp_path), made()
    screened(on)
    with editor.attach(pipe, ["Cats"], seed=3):
        first = toy.images(pipe, seed=1)
        pipe.to(torch.bfloat16)
        toy.images(pipe, seed=1)
        write(editor)
        toy.images(pipe, seed=1)  # of its own copy
        pipe.to(torch.float32)
        with pytest.raises(RuntimeError, match="written to .* attach again"):
            toy.images(pipe, seed=1)
    assert first.isfinite().all()


@pytest.mark.parametrize("form", ["inference", "transposed"])
def test_an_encoder_that_cannot_be_read_where_it_lies_is_copied(tmp_path, screened, form):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    screened(True)
    with eraser.attach(pipe, ["Cats"], seed=3):
        expected = toy.images(pipe, seed=1)
    with torch.inference_mode(form == "inference"):
        weight = sae_of(eraser).detach().clone()
    weight = weight if form == "inference" else weight.t().contiguous().t()
    eraser.sae.encoder.weight = torch.nn.Parameter(weight, requires_grad=False)
    with eraser.attach(pipe, ["Cats"], seed=3):
        assert toy.plan_of(pipe).weight.data_ptr() != sae_of(eraser).data_ptr()
        with torch.inference_mode():
            sae_of(eraser).mul_(-1)
        if form == "inference":
            assert torch.equal(toy.images(pipe, seed=1), expected)


def test_an_sae_that_moves_meanwhile_leaves_the_eraser_what_it_has(tmp_path, screened):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    screened(True)
    with eraser.attach(pipe, ["Cats"], seed=3):
        before = toy.images(pipe, seed=1)
        eraser.sae.to(torch.float64).to("meta")
        assert torch.equal(toy.images(pipe, seed=1), before)
