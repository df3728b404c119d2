"""Every cell of tests/pipeline_matrix.py: works (the concept's rows changed, other rows the same bits, restored) or is
refused with its sentence."""

import inspect
from pathlib import Path

import pytest
import torch

from lbdt.hooks import lookup
from lbdt.hooks.feature_maps import place_of, tensor_of, to_patches
from tests import tiny_pipelines as tiny
from tests import toy
from tests.hooks.test_row_layouts import embedded
from tests.pipeline_matrix import APART, COLUMNS, FRAMES, MATRIX, NO_PROMPTS, table
from tests.repeats import matches, repeats

PROMPTS = ("cat", "dog")
BLOCKS = {"sd3": "transformer.transformer_blocks.0", "flux": "transformer.single_transformer_blocks.0"}
SETS = [["Cats"], []]
FIRST_OF_ITS_CLASS = ("sd", "animatediff", "sd3", "flux", "pixart")
"""One pipeline for each class of denoiser, compiled without hooks too: to trace one takes seconds."""


def made(key: str, folder: Path):
    """The pipeline of a row, and what its calls have in common."""
    more = {"negative_prompt": list(PROMPTS), "true_cfg_scale": 3.0} if key == "flux-true-cfg" else {}
    return tiny.BUILD[key.removesuffix("-true-cfg")](folder), more


def site(key: str) -> str:
    """The block that is hooked."""
    key = key.removesuffix("-true-cfg")
    return BLOCKS.get(key, tiny.SITE[key])


def eraser(pipe, hookpoint: str, call: dict):
    """One of a latent that fires in about a third of the patches of this pipeline."""
    denoiser = lookup.find_denoiser(pipe)
    block = lookup.find_block(denoiser.module, hookpoint, expected=denoiser.root)
    seen = []

    def look(module, args, output):
        seen.append(to_patches(tensor_of(output, place_of(module)), tiny.WIDTH).flatten(2))

    handle = block.register_forward_hook(look)
    tiny.run(pipe, PROMPTS, **call)
    handle.remove()
    made = toy.eraser(width=tiny.WIDTH, hookpoint=hookpoint, padding=0)
    with torch.no_grad():
        made.sae.encoder.bias.fill_(1000.0)
        h = torch.cat([made.sae.pre_activations(x.float().transpose(1, 2))[..., 0].flatten() for x in seen])
        # The published threshold is the mean over three concepts.
        mean = made.dictionary.mean.clone()
        mean[0, :, 0] = 3 * float(h.quantile(0.7))
    dictionary = made.dictionary.replaced(mean=mean)
    return type(made)(made.sae, dictionary, hookpoint, padding=0, selection=made.selection)


def prepared(column: str, pipe) -> None:
    """What is done to the pipeline before it is called."""
    denoiser = lookup.find_denoiser(pipe)
    if column == "compiled":
        torch._dynamo.reset()
        setattr(pipe, denoiser.root, torch.compile(denoiser.module, backend="eager"))
    elif column == "offloaded":
        import accelerate

        accelerate.cpu_offload(denoiser.module, execution_device=torch.device("cpu"))
    elif column == "half":
        pipe.to(torch.bfloat16)


def call_of(column: str, pipe, more: dict) -> tuple[tuple | None, dict]:
    """The prompts and further arguments of a call."""
    if column == "unguided":
        return PROMPTS, {"guidance_scale": 1.0}
    if column == "copies":
        return PROMPTS, {**more, "num_images_per_prompt": 2}
    if column == "embeddings":
        given = embedded(pipe, PROMPTS)
        negative = embedded(pipe, ("x", "y"), "negative_")
        known = inspect.signature(type(pipe).__call__).parameters
        scale = {"true_cfg_scale": more["true_cfg_scale"]} if more else {}
        if "true_cfg_scale" in known and not more:
            negative = {}
        scale |= {"negative_prompt": None} if negative and "negative_prompt" in known else {}
        return None, given | scale | {name: value for name, value in negative.items() if name in known}
    return PROMPTS, dict(more)


CELLS = [(key, column) for key in MATRIX for column in COLUMNS]


@pytest.mark.parametrize(("key", "column"), CELLS, ids=["-".join((k, c.replace(" ", "_"))) for k, c in CELLS])
def test_it_works_or_is_refused(key, column, tmp_path):
    expected = MATRIX[key][column]
    if expected == NO_PROMPTS:
        assert "prompt" not in tiny.arguments(tiny.BUILD[key](tmp_path), PROMPTS)
        return
    pipe, more = made(key, tmp_path)
    editor = eraser(pipe, site(key), more)
    prompts, call = call_of(column, pipe, more)
    bare = column == "compiled" and key not in FIRST_OF_ITS_CLASS
    plain = tiny.run(pipe, prompts, **call) if bare else None
    root = lookup.find_denoiser(pipe).root
    uncompiled = getattr(pipe, root)
    prepared(column, pipe)
    options = {
        "one set": {"concepts": ["Cats"]},
        "cond": {"concepts": ["Cats"], "rows": "cond"},
    }.get(column, {"concepts": SETS})
    base = tiny.run(pipe, prompts, **call) if plain is None else plain
    if expected != "works":
        with editor.attach(pipe, **options), pytest.raises(ValueError, match=expected):
            tiny.run(pipe, prompts, **call)
        assert repeats(tiny.run(pipe, prompts, **call), base)
        return
    with editor.attach(pipe, **options) as handle:
        out = tiny.run(pipe, prompts, **call)
        calls = handle._recorder.read()
    changed = (~matches(out.float(), base.float())).flatten(1).any(1).tolist()
    copies = call.get("num_images_per_prompt", 1)
    wanted = [bool(names) for names in options["concepts"]] if "rows" not in options else [True]
    wanted = (
        [True] * len(changed) if column in ("one set", "cond") else [w for w in wanted for _ in range(copies)]
    )
    assert changed == wanted
    for step in calls:
        rows = torch.tensor(step.changed).view(step.halves, -1) > 0
        assert not rows[:, ~torch.tensor(wanted)].any()
        if column == "cond" and step.halves > 1:
            conditional = 0 if key == "instruct-pix2pix" else 1
            others = [
                n for n in range(step.halves) if n not in (conditional, 2 if key == "pag" else conditional)
            ]
            assert rows[conditional].any() and not rows[others].any()
    assert sum(sum(step.changed) for step in calls) > 0
    assert toy.traces(pipe) == [] or column in ("compiled", "offloaded")
    if bare:
        setattr(pipe, root, uncompiled)
    assert repeats(tiny.run(pipe, prompts, **call), base)


def test_a_cell_is_one_of_few_things():
    cells = {cell for row in MATRIX.values() for cell in row.values()}
    assert cells == {"works", FRAMES, APART, NO_PROMPTS}
    assert all(list(row) == list(COLUMNS) for row in MATRIX.values())
    assert set(tiny.BUILD) == {key for key in MATRIX if key != "flux-true-cfg"}


def test_the_documentation_shows_the_matrix():
    text = (Path(__file__).parents[2] / "lbdt/hooks/README.md").read_text()
    assert table() in text
