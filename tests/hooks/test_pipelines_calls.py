"""Whose a UNet call is: sibling pipelines, loops of one's own, threads, calls that are broken off, failures in a
call."""

import copy
import random
import threading
import warnings

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import lbdt
from tests import toy
from tests.repeats import matches, repeats

PROMPTS = ("cat", "dog", "tree")


@pytest.fixture
def pipe(tmp_path):
    return toy.pipeline(tmp_path)


def sibling(pipe, cls=StableDiffusionPipeline, **components):
    made = cls(**{**pipe.components, **components}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def loop(pipe, rows=2):
    """One UNet call of a denoising loop of one's own."""
    with torch.no_grad():
        x = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        text = pipe.encode_prompt("cat", "cpu", rows, False)[0]
        return pipe.unet(x, 999, encoder_hidden_states=text).sample


def same(images, others) -> list[bool]:
    """Which images of two runs are the same."""
    return matches(images, others).flatten(1).all(1).tolist()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"concepts": [["Cats"], [], []]}, id="a-set-a-prompt"),
        pytest.param({"concepts": ["Cats"], "seed": [1, 2, 3]}, id="a-seed-a-prompt"),
        pytest.param({"concepts": ["Cats"], "rows": "cond"}, id="conditional-rows"),
        pytest.param({"concepts": ["Cats"], "steps": (0, 2)}, id="a-window"),
    ],
)
def test_a_sibling_on_the_same_unet_is_refused_what_needs_its_rows(pipe, options):
    other = sibling(pipe)
    with (
        toy.eraser().attach(pipe, **options),
        pytest.raises(ValueError, match="no pipeline with this attachment"),
    ):
        toy.images(other, PROMPTS)
    assert toy.traces(pipe) == []


def test_a_sibling_in_the_attaching_thread_is_treated_as_one_set_for_all(pipe):
    other, base = sibling(pipe), toy.images(pipe)
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        out = toy.images(other)
        assert handle.report().replaced > 0
    assert not torch.equal(out, base) and repeats(toy.images(other), base)


def test_siblings_with_erasers_of_their_own_are_each_treated_by_theirs(pipe):
    other = sibling(pipe)
    alone = {}
    for name, which in (("Cats", pipe), ("Dogs", other)):
        with toy.eraser().attach(which, [name]):
            alone[name] = toy.images(which)
    with toy.eraser().attach(pipe, ["Cats"]) as cats, toy.eraser().attach(other, ["Dogs"]) as dogs:
        assert repeats(toy.images(pipe), alone["Cats"]) and repeats(toy.images(other), alone["Dogs"])
        assert [len(h.report().steps) for h in (cats, dogs)] == [3, 3]
    assert not torch.equal(alone["Cats"], alone["Dogs"])


def test_a_stated_layout_makes_a_loop_of_ones_own_known(pipe):
    base, eraser = loop(pipe), toy.eraser(threshold=0.02)
    with eraser.attach(pipe, [["Trees"], []], layout=("cond",)):
        first = loop(pipe)
    with eraser.attach(pipe, ["Trees"], rows="cond", layout=("uncond", "cond")):
        second = loop(pipe)
    assert same(first, base) == [False, True]
    assert same(second, base) == [True, False]


@pytest.mark.parametrize(
    "layout",
    ["cond", (), ("uncond",), ("cond", "cond"), ("cond", "other"), 2],
    ids=["text", "empty", "no-cond", "twice", "unknown", "number"],
)
def test_a_layout_that_is_none_is_refused(pipe, layout):
    with pytest.raises(ValueError, match="layout: expected the guidance branches"):
        toy.eraser().attach(pipe, ["Cats"], layout=layout)


def test_a_layout_has_to_divide_the_rows(pipe):
    with toy.eraser().attach(pipe, ["Cats"], layout=("uncond", "cond")):
        with pytest.raises(ValueError, match="2 branches, which do not divide the 3 rows"):
            loop(pipe, rows=3)


def test_prompts_that_are_encoded_in_a_callback_change_nothing(pipe):
    def encode(pipe, step, timestep, given):
        pipe.encode_prompt(["x"] * 5, "cpu", 1, True)
        return given

    with toy.eraser().attach(pipe, [["Cats"], [], []]):
        expected = toy.images(pipe, PROMPTS)
        assert repeats(toy.images(pipe, PROMPTS, callback_on_step_end=encode), expected)


def test_guidance_that_ends_within_the_call_leaves_the_prompts_rows(pipe):
    def end(pipe, step, timestep, given):
        if step == 0:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"][-3:]
        return given

    more = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    base = toy.images(pipe, PROMPTS, **more)
    with toy.eraser().attach(pipe, [["Cats"], [], []]) as handle:
        out = toy.images(pipe, PROMPTS, **more)
        assert [step.rows for step in handle.report().steps] == [6, 3, 3]
    assert same(out, base) == [False, True, True]


def test_a_call_in_another_thread_that_nothing_announced_is_left_and_said(pipe):
    other, base, got = sibling(pipe), toy.images(pipe), {}

    def work():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got["images"], got["warned"] = toy.images(other), [str(w.message) for w in caught]

    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert handle.report().steps == ()
    assert repeats(got["images"], base)
    assert all("from another thread" in text for text in got["warned"]) and len(got["warned"]) == 3


def test_eight_threads_on_four_siblings_make_the_pictures_of_one_thread(pipe):
    # Neither schedulers nor fast tokenizers may be shared by threads.
    own = ("scheduler", "tokenizer")
    pipes = [sibling(pipe, **{name: copy.deepcopy(getattr(pipe, name)) for name in own}) for _ in range(4)]
    erasers, locks = [toy.eraser() for _ in pipes], [threading.Lock() for _ in pipes]
    draw = random.Random(0)
    sets = ([], ["Cats"], ["Dogs"], ["Cats", "Trees"])
    wanted = [(draw.randrange(4), [draw.choice(sets) for _ in range(2)], seed % 5) for seed in range(200)]

    def one(number: int) -> torch.Tensor:
        place, concepts, seed = wanted[number]
        if not any(concepts):
            return toy.images(pipes[place], seed=seed, steps=2)
        with erasers[place].attach(pipes[place], concepts, seed=seed):
            return toy.images(pipes[place], seed=seed, steps=2)

    alone = {}
    for number, request in enumerate(wanted):
        key = str(request[1:])
        if key not in alone:
            alone[key] = one(number)
    got, left = {}, iter(range(len(wanted)))

    def work() -> None:
        with torch.inference_mode(False):
            for number in left:
                with locks[wanted[number][0]]:
                    got[number] = one(number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 200
    wrong = [number for number, images in got.items() if not repeats(images, alone[str(wanted[number][1:])])]
    assert wrong == []
    assert toy.traces(pipe) == []


def test_calls_of_one_pipeline_by_two_threads_take_turns(pipe):
    with toy.eraser().attach(pipe, ["Cats"]):
        expected = {seed: toy.images(pipe, seed=seed) for seed in range(4)}
        got = {}
        threads = [
            threading.Thread(target=lambda s=s: got.update({s: toy.images(pipe, seed=s)})) for s in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == [0, 1, 2, 3] and all(repeats(got[s], expected[s]) for s in got)


def test_a_call_that_was_broken_off_leaves_nothing_for_the_next(pipe):
    def stop(module, args):
        raise KeyboardInterrupt

    with toy.eraser(detect_at=toy.DETECT_AT).attach(pipe, ["Cats"]):
        expected = toy.images(pipe)
        hook = pipe.unet.up_blocks[0].attentions[0].proj_out.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            toy.images(pipe, PROMPTS)
        hook.remove()
        assert repeats(toy.images(pipe), expected)


def test_gradient_checkpointing_is_refused_by_name_where_it_would_run_blocks_twice(pipe):
    pipe.unet.enable_gradient_checkpointing()
    with toy.eraser().attach(pipe, ["Cats"]):
        assert toy.images(pipe).shape[0] == 2  # a pipeline has no gradients
        x = torch.zeros(1, 4, 8, 8, requires_grad=True)
        with pytest.raises(ValueError, match="gradient checkpointing.*disable_gradient_checkpointing"):
            pipe.unet(x, 500, encoder_hidden_states=torch.zeros(1, 16, 16))


def test_image_to_image_is_refused_a_window_that_it_does_not_enter(pipe):
    other = sibling(pipe, StableDiffusionImg2ImgPipeline)
    call = {
        "image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        "strength": 0.5,
        "steps": 8,
    }
    with toy.eraser().attach(other, ["Cats"], steps=(0, 4)):
        with pytest.raises(ValueError, match=r"steps=\(0, 4\): this call goes through the steps 4 to 7"):
            toy.images(other, **call)
    with toy.eraser().attach(other, ["Cats"], steps=(3, 5)) as handle:
        toy.images(other, **call)
        assert [step.replaced > 0 for step in handle.report().steps] == [True, False, False, False]


def test_continuous_timesteps_are_refused_before_anything_runs(pipe):
    pipe.scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.02, sigma_max=80.0
    )
    with toy.eraser().attach(pipe, ["Cats"]), pytest.raises(ValueError, match="timestep_type='continuous'"):
        toy.images(pipe)


def far(eraser):
    """The same eraser with bins at late timesteps only."""
    dictionary = eraser.dictionary.replaced(timesteps=torch.tensor([40, 30, 20, 10]))
    return lbdt.ConceptEraser(eraser.sae, dictionary, eraser.hookpoint, selection=eraser.selection)


def not_finite(pipe):
    pipe.unet.up_blocks[0].attentions[0].proj_out.weight.data.mul_(float("inf"))


def skipped(pipe):
    block = pipe.unet.up_blocks[0].attentions[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs) or inner


FAILURES = {
    "nothing-near": (far, lambda pipe: None, "far from the dictionary's, 10 to 40"),
    "not-finite": (lambda e: e, not_finite, "NaN or infinite.*images 0, 1 are not protected"),
    "did-not-run": (
        lambda e: e,
        skipped,
        "its block did not run in 3 of 3 denoiser calls of this call of StableDiffusionPipeline",
    ),
}


@pytest.mark.parametrize(("change", "spoil", "text"), FAILURES.values(), ids=FAILURES)
def test_what_is_seen_in_a_call_is_refused_or_said(pipe, change, spoil, text):
    eraser = change(toy.eraser())
    with eraser.attach(pipe, ["Cats"]):
        spoil(pipe)
        with pytest.raises(lbdt.UnprotectedError, match=text):
            toy.images(pipe)
    pipe.unet.up_blocks[0].attentions[0].__dict__.pop("forward", None)
    with eraser.attach(pipe, ["Cats"], on_failure="generate") as handle:
        spoil(pipe)
        with pytest.warns(RuntimeWarning, match=text):
            assert toy.images(pipe).shape == (2, 3, 16, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = handle.report()
    assert len(report.failures) == 1 and report.to_dict()["failures"] == list(report.failures)
    assert f"NOT PROTECTED: {report.failures[0]}" in str(report)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_memory_in_the_hook_is_an_error_or_leaves_the_images_and_says_so(pipe, monkeypatch, backend):
    from lbdt import ops
    from lbdt.hooks import erase_plan

    def none(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    base = toy.images(pipe)
    monkeypatch.setattr(ops, "replace_patches", none)
    monkeypatch.setattr(erase_plan, "erase_step_or_none", none)
    with ops.use_backend(backend):
        with toy.eraser().attach(pipe, ["Cats"], on_failure="generate") as handle:
            with pytest.warns(RuntimeWarning, match="out of memory in the hook"):
                assert repeats(toy.images(pipe), base)
            assert len(handle.report().failures) >= 3
        with toy.eraser().attach(pipe, ["Cats"]), pytest.raises(torch.OutOfMemoryError):
            toy.images(pipe)


def test_no_memory_at_an_earlier_block_leaves_the_images_and_says_so(pipe, monkeypatch):
    from lbdt import ops

    def none(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    base = toy.images(pipe)
    with toy.eraser(detect_at=toy.DETECT_AT).attach(pipe, ["Cats"], on_failure="generate") as handle:
        monkeypatch.setattr(ops, "detect_patches", none)
        with pytest.warns(RuntimeWarning, match="out of memory in the hook"):
            assert repeats(toy.images(pipe), base)
        assert len(handle.report().failures) == 3


@pytest.mark.parametrize("value", ["ignore", None, 1])
def test_another_policy_is_refused(pipe, value):
    with pytest.raises(ValueError, match="on_failure: expected one of refuse, generate"):
        toy.eraser().attach(pipe, ["Cats"], on_failure=value)
