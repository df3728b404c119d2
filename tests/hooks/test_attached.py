"""What is attached: listed, taken off, stacked, copied, exchanged modules, settings that change meanwhile."""

import copy
import io
import pickle

import pytest
import torch

import lbdt
from lbdt import Steering
from tests import toy
from tests.repeats import repeats

BLOCK = "up_blocks.0.attentions.0"


@pytest.fixture
def pipe(tmp_path):
    return toy.pipeline(tmp_path)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "torch-save": saved}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_attached_pipeline_is_a_pipeline_of_its_own(pipe, how):
    kind, base = type(pipe), toy.images(pipe)
    with toy.eraser().attach(pipe, ["Cats"]):
        erased = toy.images(pipe)
        twin = COPIES[how](pipe)
        assert type(twin) is kind and lbdt.attached(twin) == () and "_lbdt_watch" not in vars(twin)
        if how != "copy":
            assert toy.traces(twin) == [] and repeats(toy.images(twin), base)
        assert repeats(toy.images(pipe), erased)
    assert repeats(toy.images(twin), base) and type(pipe) is kind
    if how != "copy":
        for parameter in twin.unet.get_submodule(BLOCK).parameters():
            parameter.data.zero_()
        assert not torch.equal(toy.images(twin), base) and repeats(toy.images(pipe), base)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch-save"])
def test_a_copy_of_an_attached_unet_computes_with_its_own_block(pipe, how):
    with toy.eraser().attach(pipe, ["Cats"]):
        twin = COPIES[how](pipe.unet)
    original, pipe.unet = pipe.unet, twin
    assert toy.traces(pipe) == []
    changed = toy.images(pipe)
    for parameter in twin.get_submodule(BLOCK).parameters():
        parameter.data.zero_()
    assert not torch.equal(toy.images(pipe), changed)
    pipe.unet = original
    assert toy.traces(pipe) == []


def test_a_shallow_copy_with_another_text_encoder_reads_with_that(pipe):
    base = toy.images(pipe)
    with toy.eraser().attach(pipe, ["Cats"]):
        twin = copy.copy(pipe)
    twin.text_encoder = copy.deepcopy(pipe.text_encoder)
    for parameter in twin.text_encoder.parameters():
        parameter.data.zero_()
    assert not torch.equal(toy.images(twin), base)


def test_a_block_with_hooks_of_others_between_is_not_copied(pipe):
    from diffusers.hooks import HookRegistry, ModelHook

    block = pipe.unet.get_submodule(BLOCK)
    with toy.eraser().attach(pipe, ["Cats"]):
        HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "other")
        with pytest.raises(TypeError, match=r"mixed with those of others.*lbdt.detach\(pipe\)"):
            copy.deepcopy(pipe.unet)


def test_what_is_attached_is_listed_and_taken_off_without_its_handle(pipe):
    base = toy.images(pipe)
    assert lbdt.attached(pipe) == () and lbdt.detach(pipe) == 0
    toy.eraser().attach(pipe, ["Cats"])
    handle = toy.eraser(hookpoint=toy.DETECT_AT).attach(pipe, ["Cats"])
    assert len(lbdt.attached(pipe)) == 2 and lbdt.attached(pipe)[1] is handle and handle.is_on
    assert not torch.equal(toy.images(pipe), base)
    assert lbdt.detach(pipe) == 2 and not handle.is_on
    assert toy.traces(pipe) == [] and repeats(toy.images(pipe), base)


def test_what_is_no_pipeline_has_nothing_attached():
    assert lbdt.attached(object()) == () and lbdt.attached(None) == ()


@pytest.mark.parametrize("second", ["eraser", "steering"])
def test_a_second_editor_on_the_block_is_refused_unless_asked_for(pipe, second):
    made = toy.eraser() if second == "eraser" else Steering.from_eraser(toy.eraser(), strength=-1.0)
    toy.eraser().attach(pipe, ["Cats"])
    before = toy.traces(pipe)
    with pytest.raises(ValueError, match=r"attached to this block.*lbdt.detach\(pipe\).*stack=True"):
        made.attach(pipe, ["Dogs"])
    assert toy.traces(pipe) == before
    made.attach(pipe, ["Dogs"], stack=True)
    assert len(lbdt.attached(pipe)) == 2
    lbdt.detach(pipe)
    assert toy.traces(pipe) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("padding", 2),
        ("source", "mean"),
        ("min_patches", 3),
        ("hookpoint", "unet.mid_block"),
        ("selection", {}),
    ],
)
def test_a_setting_is_not_changed_behind_an_attachment(pipe, name, value):
    eraser = toy.eraser()
    with eraser.attach(pipe, ["Cats"]), pytest.raises(RuntimeError, match=f"{name}: this eraser is attached"):
        setattr(eraser, name, value)
    setattr(eraser, name, value)
    assert getattr(eraser, name) == value


def exchanged(pipe):
    pipe.unet = copy.deepcopy(pipe.unet)


def overwritten(pipe):
    block = pipe.unet.get_submodule(BLOCK)
    block.forward = type(block).forward.__get__(block)


def deleted(pipe):
    del pipe.unet.get_submodule(BLOCK).forward


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        pytest.param(exchanged, "unet: the pipeline's was exchanged", id="unet-exchanged"),
        pytest.param(overwritten, "Transformer2DModel.forward: was overwritten", id="forward-overwritten"),
        pytest.param(deleted, "Transformer2DModel.forward: was overwritten", id="forward-deleted"),
    ],
)
def test_a_hook_that_would_not_run_is_an_error_before_anything_is_generated(pipe, spoil, text):
    ran = []
    with toy.eraser().attach(pipe, ["Cats"], on_failure="generate"):
        spoil(pipe)
        hook = pipe.text_encoder.register_forward_pre_hook(lambda *args: ran.append(1))
        with pytest.raises(lbdt.UnprotectedError, match=text):
            toy.images(pipe)
        hook.remove()
    assert ran == []


def test_what_wraps_forward_and_calls_it_is_no_error(pipe):
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        block = pipe.unet.get_submodule(BLOCK)
        inner = block.forward
        block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        toy.images(pipe)
        assert handle.report().replaced > 0


def test_the_class_of_an_attached_pipeline_says_the_same_of_itself(pipe):
    import inspect

    kind, signature = type(pipe), inspect.signature(pipe.__call__)
    with toy.eraser().attach(pipe, ["Cats"]):
        assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
        assert inspect.signature(pipe.__call__) == signature
        assert set(pipe.components) == set(kind(**pipe.components).components)
    assert type(pipe) is kind
