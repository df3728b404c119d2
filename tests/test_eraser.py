"""ConceptEraser on a real (tiny, random) StableDiffusionPipeline: numbers, exact removal, refusals, compiled UNets."""

import copy
from types import SimpleNamespace

import pytest
import torch

from lbdt import reference
from lbdt.editors import ConceptEraser
from tests import toy
from tests.repeats import matches, repeats


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(shared):
    """The shared pipeline, which every test must leave as it was."""
    scheduler = shared.scheduler
    yield shared
    shared.scheduler = scheduler
    assert toy.traces(shared) == []


class Tap:
    """What the hooked block put out at each UNet call, after its diffusers hooks."""

    def __init__(self, pipe) -> None:
        self.values: list[torch.Tensor] = []
        block = pipe.unet.get_submodule(toy.HOOKPOINT.removeprefix("unet."))
        self.handle = block.register_forward_hook(lambda m, args, out: self.values.append(out[0].clone()))

    def __enter__(self) -> list[torch.Tensor]:
        return self.values

    def __exit__(self, *exception) -> None:
        self.handle.remove()


def literal(eraser, y, timestep, concept, seeds, halves, padding=1):
    """Encode, compare, dilate and replace patch by patch; y [B, d, H, W]."""
    batch, width, high, wide = y.shape
    selection = eraser.select(concept)
    bin = min(range(len(toy.TIMESTEPS)), key=lambda i: abs(toy.TIMESTEPS[i] - timestep))
    h = eraser.sae.pre_activations(y.flatten(2).transpose(1, 2))[..., selection.latents]
    mask = (h.relu() > selection.thresholds[bin]).any(-1).view(batch, high, wide)
    out, padded = y.clone(), torch.zeros_like(mask)
    for b, i, j in mask.nonzero().tolist():
        padded[b, max(i - padding, 0) : i + padding + 1, max(j - padding, 0) : j + padding + 1] = True
    for b in range(batch):
        free = [divmod(p, wide) for p in range(high * wide) if not padded[b].flatten()[p]]
        args = torch.tensor([seeds[b]]), torch.tensor([timestep]), torch.tensor([halves[b]])
        u = reference.patch_uniform(*args, high * wide)[0].tolist()
        for i, j in padded[b].nonzero().tolist() if free else ():
            y0, x0 = free[int(u[i * wide + j] * len(free))]
            out[b, :, i, j] = y[b, :, y0, x0]
    return mask, padded, out


def test_the_first_step_is_the_literal_computation(pipe):
    eraser = toy.eraser()
    with Tap(pipe) as before:
        toy.images(pipe, steps=2)
    with Tap(pipe) as after, eraser.attach(pipe, ["Dogs"], seed=[3, 9], keep_masks=True) as attached:
        toy.images(pipe, steps=2)
    timestep = int(pipe.scheduler.timesteps[0])
    mask, padded, out = literal(eraser, before[0], timestep, "Dogs", [3, 9, 3, 9], [0, 0, 1, 1])
    assert 0 < int(mask.sum()) < mask.numel() and len(after) == 2
    assert repeats(after[0], out)
    first = attached.masks()[0]
    assert torch.equal(first.detected, mask[2:]) and torch.equal(first.replaced, padded[2:])
    step = attached.report().steps[0]
    assert step.timestep == timestep and step.detected == pytest.approx(float(mask.float().mean()))


def test_removal_is_exact_and_repeatable(pipe):
    eraser, state = toy.eraser(), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    base = toy.images(pipe)
    handle = eraser.attach(pipe, ["Cats"])
    assert list(pipe.unet.state_dict()) == list(state)
    erased = toy.images(pipe)
    handle.remove()
    handle.remove()
    assert not torch.equal(erased, base) and repeats(toy.images(pipe), base)
    assert all(torch.equal(v, state[k]) for k, v in pipe.unet.state_dict().items())
    with eraser.attach(pipe, ["Cats"]):
        assert repeats(toy.images(pipe), erased)


def test_an_undetected_concept_changes_no_bit(pipe):
    base = toy.images(pipe)
    with toy.eraser(threshold=100.0).attach(pipe, ["Cats"]) as attached:
        assert repeats(toy.images(pipe), base)
    assert attached.report().detected == 0


def test_an_exception_inside_the_pipeline_leaves_no_hook(pipe):
    base = toy.images(pipe)

    def stop(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), toy.eraser().attach(pipe, ["Cats"]):
        toy.images(pipe, callback_on_step_end=stop)
    assert toy.traces(pipe) == []
    assert repeats(toy.images(pipe), base)


@pytest.mark.parametrize("order", ["first", "last"])
def test_two_erasers_at_once_come_off_in_any_order(pipe, order):
    base = toy.images(pipe)
    handles = [toy.eraser().attach(pipe, [name], stack=True) for name in ("Cats", "Dogs")]
    both = toy.images(pipe)
    handles.pop(0 if order == "first" else 1).remove()
    one = toy.images(pipe)
    handles.pop().remove()
    assert not torch.equal(both, one) and not torch.equal(one, base)
    assert repeats(toy.images(pipe), base)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_schedulers_and_a_second_call_with_other_steps(pipe, scheduler):
    import diffusers

    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with toy.eraser().attach(pipe, ["Cats"]) as attached:
        first = toy.images(pipe, steps=3)
        toy.images(pipe, steps=2)
        assert repeats(toy.images(pipe, steps=3), first)
    expected: dict[float, int] = {}
    for steps in (3, 2, 3):
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps.tolist():
            expected[t] = expected.get(t, 0) + 4
    got = {step.timestep: step.rows for step in attached.report().steps}
    assert got == pytest.approx(expected)


def test_steps_window_under_a_float_schedule(pipe):
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with toy.eraser().attach(pipe, ["Cats"], steps=(1, 3)) as attached:
        toy.images(pipe, steps=5)
    assert [step.detected > 0 for step in attached.report().steps] == [False, True, True, False, False]


def test_without_guidance_there_is_one_half(pipe):
    eraser = toy.eraser()
    with Tap(pipe) as before:
        toy.images(pipe, steps=1, guidance=1.0)
    with Tap(pipe) as after, eraser.attach(pipe, ["Cats"], seed=4, rows="cond"):
        toy.images(pipe, steps=1, guidance=1.0)
        toy.images(pipe, steps=1, guidance=4.0)
    timestep = int(pipe.scheduler.timesteps[0])
    assert repeats(after[0], literal(eraser, before[0], timestep, "Cats", [4, 5], [0, 0])[2])
    assert after[1].shape[0] == 4


def test_an_image_alone_equals_the_same_image_in_a_batch(pipe):
    eraser = toy.eraser()
    with Tap(pipe) as together, eraser.attach(pipe, ["Cats"], seed=[11, 12]):
        toy.images(pipe, ("cat", "dog"), steps=1)
    with Tap(pipe) as base:
        toy.images(pipe, ("cat", "dog"), steps=1)
    with Tap(pipe) as alone, eraser.attach(pipe, ["Cats"], seed=12):
        toy.images(pipe, ("dog",), steps=1, seed=1)
    with Tap(pipe) as alone_base:
        toy.images(pipe, ("dog",), steps=1, seed=1)
    # The UNet itself may round differently in another batch; the replacement is compared as which patch went where.
    for both, base_both, one, base_one in ((together[0][1::2], base[0][1::2], alone[0], alone_base[0]),):
        assert torch.equal(origin(both, base_both), origin(one, base_one))


def origin(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Which patch of `before` every patch of `after` is, [B, N]; both [B, d, H, W]."""
    same = matches(after.flatten(2).unsqueeze(3), before.flatten(2).unsqueeze(2))
    assert bool(same.all(1).any(2).all())
    return same.all(1).int().argmax(2)


def test_num_images_per_prompt_keeps_the_pipelines_order(pipe):
    eraser = toy.eraser()
    call = {"num_images_per_prompt": 2, "steps": 1}
    with Tap(pipe) as per_prompt, eraser.attach(pipe, [["Cats"], ["Dogs"]], seed=[5, 50]):
        toy.images(pipe, **call)
    sets, seeds = [["Cats"], ["Cats"], ["Dogs"], ["Dogs"]], [5, 6, 50, 51]
    with Tap(pipe) as per_image, eraser.attach(pipe, sets, seed=seeds):
        toy.images(pipe, **call)
    assert repeats(per_prompt[0], per_image[0])
    with Tap(pipe) as counted, eraser.attach(pipe, sets, seed=5), Tap(pipe):
        toy.images(pipe, **call)
    assert repeats(counted[0][0::4], per_image[0][0::4])


@pytest.mark.parametrize("entries", [1, 2, 3, 5, 8])
def test_a_list_of_another_length_is_refused_before_anything_is_generated(pipe, entries):
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *args: calls.append(1))
    try:
        for settings in ({"concepts": [["Cats"]] * entries}, {"concepts": ["Cats"], "seed": [1] * entries}):
            with (
                toy.eraser().attach(pipe, **settings),
                pytest.raises(ValueError, match=f"list of {entries} entries"),
            ):
                toy.images(pipe, ("a", "b", "c", "d"), num_images_per_prompt=3)
    finally:
        handle.remove()
    assert calls == []


def test_prompts_encoded_by_hand_are_no_call(pipe):
    with toy.eraser().attach(pipe, [["Cats"], ["Dogs"]], seed=1), torch.no_grad():
        first, nothing = pipe.encode_prompt("cat", "cpu", 1, True)
        embeds = {"prompt_embeds": first.repeat(2, 1, 1), "negative_prompt_embeds": nothing.repeat(2, 1, 1)}
        by_hand = pipe(
            **embeds, num_inference_steps=1, generator=[torch.Generator().manual_seed(i) for i in (0, 1)]
        )
        assert len(by_hand.images) == 2


def test_a_map_that_is_not_square(pipe):
    eraser = toy.eraser()
    with Tap(pipe) as before:
        toy.images(pipe, steps=1, height=16, width=32)
    with Tap(pipe) as after, eraser.attach(pipe, ["Cats"]):
        toy.images(pipe, steps=1, height=16, width=32)
    assert before[0].shape[2:] == (4, 8)
    timestep = int(pipe.scheduler.timesteps[0])
    assert repeats(after[0], literal(eraser, before[0], timestep, "Cats", [0, 1, 0, 1], [0, 0, 1, 1])[2])


def test_a_block_inside_the_attention_block_takes_its_grid(pipe):
    eraser = toy.eraser(hookpoint=f"{toy.HOOKPOINT}.transformer_blocks.0")
    with eraser.attach(pipe, ["Cats"], keep_masks=True) as attached:
        toy.images(pipe, steps=1, height=16, width=32)
    assert attached.masks()[0].detected.shape == (2, 4, 8)


def test_detection_at_an_earlier_block(pipe):
    eraser = toy.eraser(detect_at=toy.DETECT_AT)
    seen = []
    block = pipe.unet.mid_block.attentions[0]
    with eraser.attach(pipe, ["Cats"], keep_masks=True) as attached:
        handle = block.register_forward_hook(lambda m, args, out: seen.append(out[0]))
        toy.images(pipe, steps=1)
        handle.remove()
    mask = literal(eraser, seen[0], int(pipe.scheduler.timesteps[0]), "Cats", [0, 1, 0, 1], [0, 0, 1, 1])[0]
    assert torch.equal(attached.masks()[0].detected, mask[2:])
    later = toy.eraser(hookpoint=toy.DETECT_AT, detect_at=toy.HOOKPOINT)
    with pytest.raises(ValueError, match="runs after the hookpoint"):
        later.attach(pipe, ["Cats"])


def test_the_order_in_which_latents_are_read_changes_nothing(pipe, monkeypatch):
    eraser = toy.eraser(k=4, threshold=0.05)
    orders = [eraser.dictionary.firing_order()]
    orders += [orders[0].flip(0), torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    reports, pictures = [], []
    for order in orders:
        monkeypatch.setattr(eraser.dictionary, "firing_order", lambda order=order: order)
        with eraser.attach(pipe, ["Cats", "Trees"]) as attached:
            pictures.append(toy.images(pipe))
        reports.append(attached.report())
    assert 0 < reports[0].detected < 1
    assert all(repeats(picture, pictures[0]) for picture in pictures)
    assert reports[1:] == reports[:1] * 2


def test_attached_in_inference_mode_and_called_outside(pipe):
    with torch.inference_mode():
        attached = toy.eraser().attach(pipe, ["Cats"])
        inside = toy.images(pipe)
    with attached:
        assert repeats(toy.images(pipe), inside)


def test_a_copy_of_the_unet_is_without_the_eraser(pipe):
    with toy.eraser().attach(pipe, ["Cats"]):
        twin = copy.deepcopy(pipe.unet)
    assert toy.traces(SimpleNamespace(unet=twin)) == []


def test_a_saved_eraser_does_the_same(pipe, tmp_path):
    eraser = toy.eraser(padding=0, source="mean", bank=True)
    eraser.save_pretrained(tmp_path / "eraser")
    loaded = ConceptEraser.from_pretrained(tmp_path / "eraser")
    assert (loaded.padding, loaded.source, loaded.selection) == (0, "mean", {"top_k": 1})
    assert loaded.concepts == toy.CONCEPTS and loaded.sae.W_dec is None
    with eraser.attach(pipe, ["Cats"]):
        expected = toy.images(pipe)
    with loaded.attach(pipe, ["Cats"]):
        assert repeats(toy.images(pipe), expected)


# How it is compiled and what comes first know nothing of each other: each once is enough.
@pytest.mark.parametrize(("how", "first"), [("wrap", "attach"), ("in_place", "call")])
def test_a_compiled_unet(tmp_path, how, first):
    pipe = toy.pipeline(tmp_path)
    eraser, base = toy.eraser(), toy.images(pipe)
    with eraser.attach(pipe, ["Cats"], seed=2):
        expected = toy.images(pipe)
    torch._dynamo.reset()
    if how == "wrap":
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    else:
        pipe.unet.compile(fullgraph=True, backend="aot_eager")
    if first == "call":
        toy.images(pipe)
    torch._dynamo.utils.counters.clear()
    with eraser.attach(pipe, ["Cats"], seed=2) as attached:
        assert repeats(toy.images(pipe), expected)
    # All timesteps share one graph: nothing about a step is Python state.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(attached.report().steps) == 3
    assert repeats(toy.images(pipe), base)


def test_a_compiled_unet_at_other_sizes(tmp_path):
    from diffusers import EulerDiscreteScheduler

    eager, compiled = toy.pipeline(tmp_path), toy.pipeline(tmp_path)
    for pipe in (eager, compiled):
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    torch._dynamo.reset()
    compiled.unet = torch.compile(compiled.unet, fullgraph=True, backend="eager")
    first, second = toy.eraser(), toy.eraser()
    with first.attach(eager, ["Cats"], steps=(1, 3)), second.attach(compiled, ["Cats"], steps=(1, 3)):
        for call in ({}, {"steps": 4}, {"guidance": 1.0}, {"prompts": ("a", "b", "c")}):
            assert repeats(toy.images(compiled, **call), toy.images(eager, **call))
    assert first.report() == second.report()
