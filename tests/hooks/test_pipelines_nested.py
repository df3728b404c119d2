"""Calls within calls, changes within and beside calls, and what is left where one of several attachments fails."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import HeunDiscreteScheduler

import lbdt
from lbdt import Steering
from tests import toy
from tests.hooks.test_pipelines_calls import sibling
from tests.repeats import matches, repeats

BLOCK = "up_blocks.0.attentions.0"


@pytest.fixture
def pipe(tmp_path):
    return toy.pipeline(tmp_path)


def spoil(pipe, factor=float("inf")):
    pipe.unet.get_submodule(BLOCK).proj_out.weight.data.mul_(factor)


def compiled(pipe):
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def once(function):
    """A callback that calls `function(pipe)` after the first step of the outermost call."""
    done = []

    def callback(pipe, step, timestep, given):
        if not done:
            done.append(1)
            function(pipe)
        return given

    return callback


def in_a_thread(function, seconds=60):
    """What `function()` returns in a thread of its own."""
    got = []
    thread = threading.Thread(target=lambda: got.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert got, "the thread waits for ever, or failed"
    return got[0]


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_call_within_a_call_of_the_same_pipeline_leaves_the_outer_ones_checks(pipe, how):
    if how == "compiled":
        compiled(pipe)

    def inner_of(p):
        toy.images(p, ("tree",), steps=1)
        block = p.unet._orig_mod if how == "compiled" else p.unet
        block.get_submodule(BLOCK).proj_out.weight.data.mul_(float("inf"))

    with toy.eraser().attach(pipe, ["Cats"]):
        with pytest.raises(lbdt.UnprotectedError, match="NaN or infinite"):
            toy.images(pipe, callback_on_step_end=once(inner_of))
        assert in_a_thread(lambda: _refused(pipe))
    assert toy.traces(pipe) == []


def _refused(pipe) -> bool:
    try:
        toy.images(pipe)
    except lbdt.UnprotectedError:
        return True
    return False


def test_a_call_of_a_sibling_within_a_call_ends_with_the_outer_ones_eraser(pipe):
    other = sibling(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    with toy.eraser().attach(pipe, ["Cats"]), toy.eraser().attach(other, ["Dogs"]) as dogs:
        wanted = toy.images(pipe)
        alone = toy.images(other)
        before = len(dogs._recorder.read())
        got = []
        out = toy.images(pipe, callback_on_step_end=once(lambda p: got.append(toy.images(other))))
        assert repeats(out, wanted) and repeats(got[0], alone)
        assert len(dogs._recorder.read()) - before == 3


def test_a_sibling_without_a_compiled_wrapper_is_treated_by_its_own_eraser(pipe):
    other = sibling(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    with toy.eraser().attach(other, ["Dogs"]):
        wanted = toy.images(other)
    compiled(pipe)
    with toy.eraser().attach(pipe, ["Cats"]) as cats, toy.eraser().attach(other, ["Dogs"]):
        toy.images(pipe)
        assert repeats(toy.images(other), wanted)
        assert len(cats._recorder.read()) == 3


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_where_one_attachment_fails_the_others_are_left_in_order(pipe, how):
    if how == "compiled":
        compiled(pipe)
    unet = pipe.unet._orig_mod if how == "compiled" else pipe.unet
    weight = unet.get_submodule(BLOCK).proj_out.weight
    good = weight.data.clone()
    with toy.eraser().attach(pipe, ["Cats"]), toy.eraser(hookpoint=toy.DETECT_AT).attach(pipe, ["Dogs"]):
        wanted = toy.images(pipe)
        weight.data.mul_(float("inf"))
        with pytest.raises(lbdt.UnprotectedError):
            toy.images(pipe)
        weight.data.copy_(good)
        assert repeats(in_a_thread(lambda: toy.images(pipe)), wanted)


def test_two_threads_that_call_each_others_pipelines_do_not_wait_for_ever(pipe):
    other = sibling(pipe, scheduler=copy.deepcopy(pipe.scheduler), tokenizer=copy.deepcopy(pipe.tokenizer))
    barrier, errors = threading.Barrier(2), []

    def cross(first, second):
        def call(p):
            barrier.wait(30)
            try:
                toy.images(second, steps=1)
            except RuntimeError as error:
                errors.append(str(error))

        toy.images(first, callback_on_step_end=once(call))
        return True

    with toy.eraser().attach(pipe, ["Cats"]), toy.eraser().attach(other, ["Dogs"]):
        threads = [
            threading.Thread(target=cross, args=pair, daemon=True) for pair in ((pipe, other), (other, pipe))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert errors and all(
        "within a pipeline's call, while another thread is within a call" in text for text in errors
    )


@pytest.mark.parametrize("change", ["remove", "off", "set"])
def test_what_another_thread_changes_waits_for_the_end_of_the_call(pipe, change):
    handle = toy.eraser().attach(pipe, ["Cats"], room=2)
    wanted = toy.images(pipe)
    does = {
        "remove": handle.remove,
        "off": lambda: handle.set(enabled=False),
        "set": lambda: handle.set(concepts=["Dogs"]),
    }[change]
    threads = []

    def begin(p):
        threads.append(threading.Thread(target=does))
        threads[0].start()
        threads[0].join(0.2)
        assert threads[0].is_alive()

    assert repeats(toy.images(pipe, callback_on_step_end=once(begin)), wanted)
    threads[0].join(30)
    assert not threads[0].is_alive() and not matches(toy.images(pipe), wanted).all()
    lbdt.detach(pipe)


def test_what_is_attached_within_a_call_is_checked_at_its_end(pipe):
    handles = []

    def attach(p):
        handles.append(toy.eraser().attach(p, ["Cats"]))
        spoil(p)

    with pytest.raises(lbdt.UnprotectedError, match="NaN or infinite"):
        # It was watched from the beginning by another one.
        with toy.eraser(hookpoint=toy.DETECT_AT).attach(pipe, ["Dogs"]):
            toy.images(pipe, callback_on_step_end=once(attach))
    lbdt.detach(pipe)


def test_a_block_that_runs_in_some_steps_only_is_a_failure(pipe):
    block, calls = pipe.unet.get_submodule(BLOCK), []
    with toy.eraser().attach(pipe, ["Cats"]):
        inner = block.forward

        def cached(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs) if len(calls) == 1 else type(block).forward(block, *args, **kwargs)

        block.forward = cached
        with pytest.raises(lbdt.UnprotectedError, match="did not run in 2 of 3 denoiser calls"):
            toy.images(pipe)


def test_half_of_the_rows_under_guidance_are_not_taken_for_all_of_a_branch(pipe):
    def drop(pipe, step, timestep, given):
        if step == 0:
            given["latents"] = given["latents"][:1]
            given["prompt_embeds"] = given["prompt_embeds"][[0, 2]]
        return given

    names = ["latents", "prompt_embeds"]
    with toy.eraser().attach(pipe, [["Cats"], []]), pytest.raises(ValueError, match="2 rows for 2 images"):
        toy.images(pipe, callback_on_step_end=drop, callback_on_step_end_tensor_inputs=names)


def test_a_stated_layout_gives_way_to_what_is_known(pipe):
    base = toy.images(pipe, guidance=1.0)
    with toy.eraser().attach(pipe, ["Cats"], rows="cond", layout=("uncond", "cond")):
        out = toy.images(pipe, guidance=1.0)
    assert not matches(out, base).flatten(1).all(1).any()


def test_a_window_of_steps_is_refused_where_timesteps_come_twice(pipe):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with toy.eraser().attach(pipe, ["Cats"], steps=(1, 2)), pytest.raises(ValueError, match="Heun.*twice"):
        toy.images(pipe)
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        toy.images(pipe)
        assert handle.report().replaced > 0


@pytest.mark.parametrize("rule", ["saeuron", "sdxl"])
def test_fewer_concepts_are_set_on_a_steering(pipe, rule):
    def steering():
        return Steering.from_eraser(toy.eraser(), rule=rule, strength=-2.0)

    with steering().attach(pipe, ["Dogs"]):
        wanted = toy.images(pipe)
    with steering().attach(pipe, ["Cats", "Dogs", "Trees"]) as handle:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            toy.images(pipe)
        handle.set(concepts=["Dogs"])
        assert repeats(toy.images(pipe), wanted)


def test_a_gate_does_not_depend_on_the_concepts_that_are_attached(pipe):
    with toy.eraser(min_patches=2).attach(pipe, [["Cats"], []]):
        wanted = toy.images(pipe)
    with toy.eraser(min_patches=2).attach(pipe, [[], []], room=1) as handle:
        toy.images(pipe)
        handle.set(concepts=[["Cats"], []])
        assert repeats(toy.images(pipe), wanted)


def test_what_is_off_refuses_nothing(pipe):
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        handle.set(enabled=False)
        spoil(pipe)
        assert toy.images(pipe).shape == (2, 3, 16, 16)
        handle.set(enabled=True)
        with pytest.raises(lbdt.UnprotectedError):
            toy.images(pipe)


def test_an_interrupted_call_is_not_refused_its_window(pipe):
    def stop(pipe, step, timestep, given):
        pipe._interrupt = True
        return given

    with toy.eraser().attach(pipe, ["Cats"], steps=(2, 3)):
        assert toy.images(pipe, callback_on_step_end=stop).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("part", ["sae", "weights", "dictionary"])
def test_a_compiled_attachment_is_of_the_editors_parts_as_they_are(pipe, part):
    def changed(eraser):
        if part == "sae":
            eraser.sae = copy.deepcopy(eraser.sae)
        if part in ("sae", "weights"):
            with torch.no_grad():
                eraser.sae.encoder.weight.mul_(-1)
        else:
            mean = eraser.dictionary.mean.flip(0)
            eraser.dictionary = eraser.dictionary.replaced(mean=mean)
        return eraser

    with changed(toy.eraser()).attach(pipe, ["Cats"], seed=2):
        wanted = toy.images(pipe)
    compiled(pipe)
    eraser = toy.eraser()
    with eraser.attach(pipe, ["Cats"], seed=2):
        toy.images(pipe)
    with changed(eraser).attach(pipe, ["Cats"], seed=2):
        assert repeats(toy.images(pipe), wanted)


@pytest.mark.parametrize("how", ["eager", "compiled", "left-on"])
def test_a_pipeline_that_nobody_holds_is_freed(tmp_path, how):
    pipe, eraser = toy.pipeline(tmp_path), toy.eraser()
    if how == "compiled":
        compiled(pipe)
    handle = eraser.attach(pipe, ["Cats"])
    toy.images(pipe)
    if how != "left-on":
        handle.remove()
    seen = weakref.ref(pipe.unet)
    del pipe, handle
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None


def test_a_pipeline_made_by_the_class_of_an_attached_one_is_plain(pipe):
    kind = type(pipe)
    with toy.eraser().attach(pipe, ["Cats"]):
        made = type(pipe)(**pipe.components, requires_safety_checker=False)
        assert type(made) is kind and lbdt.attached(made) == ()


def test_a_class_that_has_no_subclasses_is_left_as_it_was(pipe):
    class Final(type(pipe)):
        def __init_subclass__(cls):
            raise TypeError("no subclasses")

    pipe.__class__ = Final
    with pytest.raises(TypeError, match="no subclasses"):
        toy.eraser().attach(pipe, ["Cats"])
    assert toy.traces(pipe) == [] and lbdt.attached(pipe) == ()


def test_a_class_that_copies_itself_is_copied_by_itself(pipe):
    class Own(type(pipe)):
        def __getstate__(self):
            return {**vars(self), "mark": 7}

    pipe.__class__ = Own
    with toy.eraser().attach(pipe, ["Cats"]):
        twin = copy.copy(pipe)
    assert type(twin) is Own and twin.mark == 7 and "_lbdt_watch" not in vars(twin)
