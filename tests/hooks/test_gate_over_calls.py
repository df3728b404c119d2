"""A gate over the calls of a run, through the hook: when a picture begins to be treated, and when a run begins."""

import threading

import pytest
import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.editors.call_watch import UnprotectedError
from lbdt.hooks import pipeline_calls
from lbdt.hooks.run_memory import RunMemory
from tests import toy
from tests.repeats import repeats

WIDTH, SIDE = 4, 4
CPU = torch.device("cpu")


def with_run_gate(eraser, least: int):
    """The eraser, with a gate of `least` quarters of a patch of the mean over a run, at every timestep."""
    shape = len(toy.CONCEPTS), len(toy.TIMESTEPS), 70
    on, off = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    on[..., -1], off[..., least - 1] = 10, 10
    counts = PictureCounts(on, off, SIDE * SIDE, eraser.selection, 0.005, "run")
    eraser.dictionary = eraser.dictionary.replaced(gate=counts)
    return eraser


def dials(least: int = 8, **settings):
    """Concept i is channel i, above 0.5; two patches in the mean are enough by default."""
    eraser = toy.eraser(
        width=WIDTH, latents=WIDTH, threshold=0.5, hookpoint="unet.block", padding=0, **settings
    )
    with torch.no_grad():
        eraser.sae.encoder.weight.copy_(torch.eye(WIDTH))
        eraser.sae.b_dec.zero_()
    return with_run_gate(eraser, least)


def showing(*counts: int) -> torch.Tensor:
    """[B, d, H, W]: as many patches of row b as `counts` says show Cats; all others differ."""
    x = torch.arange(1.0, SIDE * SIDE + 1).view(1, 1, SIDE, SIDE).repeat(len(counts), WIDTH, 1, 1) * -0.01
    for row, count in enumerate(counts):
        x[row, 0].view(-1)[:count] = 2.0
    return x


def treated(pipe, calls, timesteps=(999, 666, 333, 1)) -> list[list[bool]]:
    """Of every call which rows were changed; `calls`: the patches that show Cats, row by row."""
    seen = []
    for counts, timestep in zip(calls, timesteps, strict=True):
        x = showing(*counts)
        with torch.no_grad():
            out = pipe.unet(torch.full((len(counts),), float(timestep)), x)[0]
        seen.append((out != x).flatten(1).any(1).tolist())
    return seen


@pytest.fixture
def pipe():
    return toy.EchoPipe(WIDTH)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        pytest.param([2, 2, 2, 2], [1, 1, 1, 1], id="enough-from-the-first"),
        pytest.param([1, 1, 1, 1], [0, 0, 0, 0], id="never-enough"),
        pytest.param([0, 0, 9, 3], [0, 0, 1, 1], id="found-late"),
        pytest.param([2, 1, 0, 1], [1, 1, 0, 1], id="found-stays-found"),
        pytest.param([1, 2, 2, 3], [0, 0, 0, 1], id="the-mean-and-not-the-call"),
        pytest.param([0, 2, 3, 3], [0, 0, 0, 1], id="on-the-edge"),
    ],
)
def test_the_mean_over_the_run_decides(pipe, counts, expected):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        seen = treated(pipe, [[count] for count in counts])
    assert seen == [[bool(each)] for each in expected]
    gated = sum(count > 0 and not each for count, each in zip(counts, expected, strict=True))
    assert attached.report().gated == gated


def test_rows_are_counted_alone(pipe):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[2, 1, 0], [0, 1, 9], [1, 1, 1], [1, 1, 1]]) == [
            [True, False, False],
            [False, False, True],
            [True, False, True],
            [True, False, True],
        ]


def test_the_prompts_row_is_counted_for_both_branches():
    pipe = toy.EchoPipe(WIDTH, guided=True)
    with dials().attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[9, 1], [9, 4], [9, 9], [1, 0]]) == [
            [False, False],
            [True, True],
            [True, True],
            [True, False],
        ]


@pytest.mark.parametrize("timestep", [999, 1], ids=["rises", "stays"])
def test_a_timestep_that_does_not_fall_begins_a_run(pipe, timestep):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[9], [1]], (666, 1)) == [[True], [True]]
        assert treated(pipe, [[1]], (timestep,)) == [[False]], "what was found before is of another picture"
        assert treated(pipe, [[4]], (0,)) == [[True]], "and it dilutes nothing"


def test_other_rows_begin_a_run(pipe):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[9, 9], [1, 1]], (999, 666)) == [[True] * 2] * 2
        assert treated(pipe, [[1], [1, 1, 1]], (333, 1)) == [[False], [False] * 3]


def test_a_run_that_is_said_to_begin(pipe):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        assert treated(pipe, [[9], [1]], (999, 666)) == [[True]] * 2
        attached.begin_run()
        assert treated(pipe, [[1]], (333,)) == [[False]]


def test_other_concepts_begin_a_run(pipe):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        assert treated(pipe, [[9], [1]], (999, 666)) == [[True]] * 2
        attached.set(concepts=["Cats", "Dogs"])
        assert treated(pipe, [[1]], (333,)) == [[False]]


def test_calls_outside_of_the_window_are_not_of_the_run():
    pipe = toy.EchoPipe(WIDTH)
    with dials().attach(pipe, ["Cats"], layout=pipe.layout, steps=(2, 4)):
        assert treated(pipe, [[9], [9], [2], [2]]) == [[False], [False], [True], [True]]
    with dials().attach(pipe, ["Cats"], layout=pipe.layout, steps=(1, 4)):
        assert treated(pipe, [[9], [1], [3], [1]]) == [[False], [False], [True], [True]]


def test_a_number_that_is_given_counts_each_call(pipe):
    with dials(min_patches=2).attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[2], [1], [1], [2]]) == [[True], [False], [False], [True]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


def test_every_call_of_the_pipeline_is_a_run_of_its_own(pictures):
    eraser = with_run_gate(toy.eraser(padding=0), 27)
    with eraser.attach(pictures, ["Cats"]) as attached:
        first = made(pictures)
        gated = attached.report().gated
        assert gated > 0
        assert repeats(made(pictures), first) and attached.report().gated == 2 * gated
    with eraser.attach(pictures, ["Cats"]):
        assert repeats(made(pictures), first)
        # A broken call leaves nothing behind.
        with pytest.raises(RuntimeError, match="stop"):
            made(pictures, callback_on_step_end=stop)
        assert repeats(made(pictures), first)


def made(pipe, **call):
    """Pictures of which the first is found late."""
    return toy.images(pipe, prompts=("cat", "dog", "ab"), steps=4, **call)


def stop(pipe, step, timestep, tensors):
    raise RuntimeError("stop")


def test_a_call_within_a_call_takes_nothing_from_it(pictures):
    eraser = with_run_gate(toy.eraser(padding=0), 27)

    def within(pipe, step, timestep, tensors):
        if step == 1:
            toy.images(pictures, prompts=("ab",), steps=2, seed=9)
            pipe.scheduler.set_timesteps(4)
        return tensors

    with eraser.attach(pictures, ["Cats"]) as attached:
        alone = made(pictures)
        before = attached.report().gated
        assert 0 < before < 12
        assert repeats(made(pictures, callback_on_step_end=within), alone)


@pytest.mark.parametrize("how", ["all", "block"])
def test_compiled_it_is_the_same(tmp_path, how):
    pipe = toy.pipeline(tmp_path)
    eraser = with_run_gate(toy.eraser(padding=0), 27)
    with eraser.attach(pipe, ["Cats"]) as attached:
        expected = [made(pipe), made(pipe, seed=5)]
        wanted = attached.report().gated
    torch._dynamo.reset()
    if how == "all":
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    else:
        pipe.unet.up_blocks[0].attentions[0].compile(fullgraph=True, backend="eager")
    with eraser.attach(pipe, ["Cats"]) as attached:
        found = [made(pipe), made(pipe, seed=5)]
        assert attached.report().gated == wanted
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert repeats(made(pipe), found[0]), "a second call compiles nothing"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_in_inference_mode_and_out_of_it(pipe):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout):
        with torch.inference_mode():
            assert treated(pipe, [[9], [1]], (999, 666)) == [[True]] * 2
        assert treated(pipe, [[1]], (333,)) == [[True]]
        with torch.inference_mode():
            assert treated(pipe, [[1]], (999,)) == [[False]]


def test_memory_grows_to_the_images_and_keeps_its_place():
    memory = RunMemory(2, CPU, whole_calls=True)

    def call(*timesteps, images=None, found=None):
        images = images or len(timesteps)
        so_far = memory.rows(torch.tensor(timesteps), None, images)
        before = so_far.tolist()
        memory.keep(so_far.fill_(found) if found is not None else so_far, images)
        return before

    place = memory._sums.data_ptr()
    assert call(9.0, 9.0, found=5) == [[0] * 3] * 2
    assert call(9.0, 10.0) == [[5] * 3, [0] * 3] and memory._sums.data_ptr() == place
    assert call(8.0, 8.0, 8.0, 8.0, images=2) == [[5] * 3, [0] * 3] * 2, "two branches"
    assert call(7.0, 7.0) == [[5] * 3, [0] * 3], "one again"
    assert call(*[3.0] * 100, found=1) == [[0] * 3] * 100
    assert call(2.0, 2.0) == [[0] * 3] * 2


def test_guidance_that_is_switched_off_keeps_what_was_found(pictures):
    """As diffusers' SDCFGCutoffCallback does it: from half of the steps on there is one branch."""

    def cutoff(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-3:]
        return tensors

    with with_run_gate(toy.eraser(padding=0), 28).attach(pictures, ["Cats"], keep_masks=True) as attached:
        made(pictures, callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    calls = attached._recorder.read()
    assert [call.halves for call in calls] == [2, 2, 1, 1]
    # The prompt's rows: images 1 and 2 are found in the first call, and show less than 28 quarters in the later ones.
    detected = [(call.cells[-3:].flatten(1) & 1).sum(1).tolist() for call in calls]
    assert detected[0][0] == 0 < min(detected[0][1:])
    assert all(0 < count < 7 for counts in detected[2:] for count in counts[1:])


@pytest.mark.parametrize("how", ["set", "begin_run"])
def test_another_thread_ends_the_run_too(pipe, how):
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        assert treated(pipe, [[9], [1]], (999, 666)) == [[True]] * 2
        change = attached.begin_run if how == "begin_run" else lambda: attached.set(concepts=["Cats"])
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
        assert treated(pipe, [[1]], (333,)) == [[False]]


def test_set_within_a_nested_call_ends_the_outer_calls_run_too(pictures):
    eraser = with_run_gate(toy.eraser(padding=0), 27)
    with eraser.attach(pictures, ["Cats"]) as attached:

        def inner(pipe, step, timestep, tensors):
            attached.set(concepts=["Cats"])
            return tensors

        def outer(pipe, step, timestep, tensors):
            if step == 1:
                toy.images(pictures, prompts=("ab",), steps=1, callback_on_step_end=inner)
                pipe.scheduler.set_timesteps(4)
                counts.append([m.epoch for m in pipeline_calls.running().kept.values()])
            return tensors

        counts = []
        made(pictures, callback_on_step_end=outer)
        state = attached._calls.state
        assert counts == [[state._epoch - 1]], (
            "the outer call's memory has not heard of it before its next call"
        )


def test_a_reused_stand_begins_a_run():
    pipe = toy.EchoPipe(WIDTH)
    pipe.unet.block.compile(backend="eager")
    eraser = dials()
    with eraser.attach(pipe, ["Cats"], layout=pipe.layout):
        assert treated(pipe, [[9], [9]], (999, 666)) == [[True]] * 2
    with eraser.attach(pipe, ["Dogs"], layout=pipe.layout):
        x = showing(0)
        x[0, 1].view(-1)[0] = 2.0  # one patch of Dogs, which is not enough
        with torch.no_grad():
            assert torch.equal(pipe.unet(torch.full((1,), 333.0), x)[0], x)


def test_every_batch_size_compiles_one_graph(tmp_path):
    pipe = toy.pipeline(tmp_path)
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=counted, dynamic=False)
    with with_run_gate(toy.eraser(padding=0), 27).attach(pipe, ["Cats"]):
        for size in (1, 2, 3, 2, 1):
            toy.images(pipe, prompts=("ab",) * size, steps=2)
    assert len(graphs) == 3


@pytest.mark.parametrize("concepts", [[[]], [[], []]], ids=str)
def test_sets_without_a_concept_change_nothing_until_there_is_one(pictures, concepts):
    call = {"prompts": ("cat", "dog")[: len(concepts)]}
    base = toy.images(pictures, **call)
    with with_run_gate(toy.eraser(padding=0), 1).attach(pictures, concepts) as attached:
        assert repeats(toy.images(pictures, **call), base) and attached.report().gated == 0
        attached.set(concepts=[["Cats"]] * len(concepts))
        assert not torch.equal(toy.images(pictures, **call), base)


def with_early(eraser):
    """A gate of twenty timesteps, of which no picture passes the first three and every one the others."""
    shape = len(toy.CONCEPTS), 20, 20
    on, off = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    on[..., 1], off[..., -1] = 10, 10
    before = eraser.dictionary
    counts = PictureCounts(on, off, SIDE * SIDE, eraser.selection, 0.005, "run")
    eraser.dictionary = ConceptDictionary(
        toy.CONCEPTS,
        tuple(range(999, 0, -50)),
        before.mean[:, :1].expand(-1, 20, -1),
        before.counts[:, :1].expand(-1, 20),
        fired=before.fired,
        gate=counts,
    )
    return eraser


@pytest.mark.parametrize(
    ("steps", "window", "refused"),
    [
        pytest.param(1, None, True, id="one-step"),
        pytest.param(20, (0, 3), True, id="a-window-of-the-first"),
        pytest.param(20, (0, 4), False, id="a-window-with-one-more"),
        pytest.param(20, None, False, id="whole"),
        pytest.param(2, None, False, id="two-steps"),
    ],
)
def test_a_call_that_ends_while_the_gate_waits_is_refused(pictures, steps, window, refused):
    eraser = with_early(toy.eraser(padding=0))
    call = {"prompts": ("cat",), "steps": steps}
    with eraser.attach(pictures, ["Cats"], steps=window):
        if refused:
            with pytest.raises(UnprotectedError, match=r"first 3 of the dictionary's 20 .* min_patches=1"):
                spread(pictures, **call)
        else:
            spread(pictures, **call)
    if refused:
        with eraser.attach(pictures, ["Cats"], steps=window, on_failure="generate"):
            with pytest.warns(RuntimeWarning, match="a concept may be left"):
                spread(pictures, **call)
        with eraser.attach(pictures, [[]], steps=window):
            spread(pictures, **call)
        eraser.min_patches = 1
        with eraser.attach(pictures, ["Cats"], steps=window):
            spread(pictures, **call)


def spread(pipe, **call):
    """Pictures whose first timestep is the schedule's largest."""
    before = pipe.scheduler
    pipe.scheduler = type(before).from_config(before.config, timestep_spacing="trailing")
    try:
        return toy.images(pipe, **call)
    finally:
        pipe.scheduler = before
