"""A gate over the calls of a run, through the hook: when a picture begins to be treated, and when a run begins."""

import pytest
import torch

from lbdt.dictionary.picture_counts import PictureCounts
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


def test_memory_grows_to_the_rows_and_keeps_its_place():
    memory = RunMemory(2, CPU, whole_calls=True)
    rows = memory.rows(torch.tensor([9.0, 9.0]), None)
    rows.fill_(5)
    again = memory.rows(torch.tensor([9.0, 10.0]), None)
    assert again.data_ptr() == rows.data_ptr() and again.tolist() == [[5] * 3, [0] * 3]
    many = memory.rows(torch.full((100,), 3.0), None)
    assert many.shape == (100, 3) and not many.any()
    assert memory.rows(torch.full((2,), 2.0), None).tolist() == [[0] * 3] * 2
