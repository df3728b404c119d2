"""What an eraser knows, and the patches that fire its latents most."""

import itertools
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from lbdt import canvas
from lbdt.activations.capture import capture
from lbdt.activations.prompts import Prompt
from lbdt.app.example_files import FOLDER, read_sheet, stored_for, write_firings, write_sheet
from lbdt.app.examples import TOP, ExampleSet, LatentExample, Progress, compute_examples, site_of
from lbdt.app.inspecting import concept_table, curves, examples
from lbdt.editors import Steering
from tests import toy
from tests.repeats import repeats

STEPS = 3
TEXTS = ("ab", "dog", "a tree", "cat", "bird")
PROMPTS = [Prompt(text, seed=seed) for seed, text in enumerate(TEXTS, 50)]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def never() -> bool:
    return False


@pytest.mark.parametrize("kind", list(canvas.KINDS))
def test_the_table_and_the_curves_are_the_selections(kind):
    eraser = canvas.load_eraser(kind)
    rows = {row.concept: row for row in concept_table(eraser)}
    assert tuple(rows) == eraser.concepts
    for name in ("Cats", "Waterfalls"):
        selection, found = eraser.select(name), curves(eraser, name)
        assert (
            sorted(curve.latent for curve in found) == list(rows[name].latents) == selection.latents.tolist()
        )
        assert 0 <= rows[name].off < rows[name].on <= 1 and rows[name].thresholds == "calibrated"
        score = eraser.dictionary.scores()[eraser.dictionary.index(name)]
        means = [sum(curve.scores) for curve in found]
        assert means == sorted(means, reverse=True)
        for curve in found:
            assert curve.timesteps == tuple(eraser.dictionary.timesteps.tolist())
            assert repeats(torch.tensor(curve.scores), score[:, curve.latent])
            column = selection.thresholds[:, selection.latents.tolist().index(curve.latent)]
            limits = [torch.inf if limit is None else limit for limit in curve.thresholds]
            assert torch.equal(torch.tensor(limits), column)
            assert max(curve.means) > 0


def test_of_an_eraser_that_is_not_calibrated_rates_are_not_known():
    row = asdict(concept_table(toy.eraser())[1])
    assert row == {"concept": "Dogs", "latents": (1,), "thresholds": "published", "on": None, "off": None}
    with pytest.raises(ValueError, match="did you mean 'Cats'"):
        curves(toy.eraser(), "cat")


def activations(pipe, eraser, prompt):
    """Every latent's activation in every patch and timestep, [T, N, L], of one picture alone, and the picture."""
    found = []

    class Taken:
        def begin(self, timestep):
            return True

        def take(self, site, x, sample):
            code = eraser.sae.encode(x[0])
            found.append(
                torch.zeros(len(x[0]), eraser.sae.config.num_latents).scatter(1, code.indices, code.values)
            )

        def end(self):
            pass

    with torch.no_grad(), capture(pipe, [site_of(eraser)], 1, Taken()):
        picture = pipe(
            prompt.text,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(prompt.seed),
        ).images[0]
    return torch.stack(found), picture


@pytest.mark.parametrize("update", [False, True], ids=["output", "update"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_examples_are_the_strongest_patches_of_the_strongest_pictures(pipe, update, batch):
    eraser, latents = toy.eraser(update=update, k=4), (7, 0, 63, 31)
    *told, found = compute_examples(
        pipe, eraser, latents, PROMPTS, steps=STEPS, guidance=3.0, cancelled=never, batch=batch
    )
    assert told == [Progress(min(at + batch, 5), 5) for at in range(0, 5, batch)]
    alone = [activations(pipe, eraser, prompt) for prompt in PROMPTS]
    times = pipe.scheduler.timesteps.tolist()
    for latent in latents:
        got = found.of(latent)
        best = sorted((float(z[:, :, latent].max()) for z, _ in alone), reverse=True)
        wanted = [value for value in best if value > 0]
        assert [e.value for e in got] == pytest.approx(wanted, rel=1e-4)
        for example in got:
            z, picture = alone[PROMPTS.index(example.prompt)]
            assert example.grid == (4, 4) and example.latent == latent
            patch = z[times.index(example.timestep), 4 * example.row + example.column, latent]
            assert example.value == pytest.approx(float(patch), rel=1e-4)
            assert example.picture.size == picture.size
    assert sum(len(found.of(latent)) for latent in latents) > 0
    assert found.of(7, most=1) == found.of(7)[:1]
    assert toy.traces(pipe) == []
    with pytest.raises(LookupError, match="latent 5: was not looked at"):
        found.of(5)


def test_no_more_than_the_best_are_kept_and_none_of_what_fires_nowhere(pipe):
    prompts = [Prompt("cat", seed=seed) for seed in range(TOP + 3)]
    eraser = toy.eraser()
    with torch.no_grad():
        eraser.sae.encoder.bias[3] = -1e6
        eraser.sae.encoder.bias[4] = 1e3
    *_, found = compute_examples(pipe, eraser, [3, 4], prompts, steps=1, cancelled=never, batch=5)
    assert found.of(3) == () and len(found.of(4)) == TOP
    values = [example.value for example in found.of(4)]
    assert values == sorted(values, reverse=True)
    assert len(found.pictures) == TOP and len({e.prompt.seed for e in found.of(4)}) == TOP


def test_cancelled_it_ends_without_a_set(pipe):
    asked = itertools.count()
    events = list(
        compute_examples(
            pipe,
            toy.eraser(),
            [0],
            PROMPTS,
            steps=STEPS,
            cancelled=lambda: next(asked) >= STEPS + 1,  # asked at every call of the denoiser
            batch=2,
        )
    )
    assert events == [Progress(2, 5)] and toy.traces(pipe) == []


@pytest.mark.parametrize(
    ("latents", "kind", "message"),
    [
        ([], ValueError, "latents: expected one or more, each once, got 0"),
        ([1, 1], ValueError, "latents: expected one or more, each once, got 2"),
        ([64], ValueError, "latents: expected numbers from 0 to 63, got 64"),
        ([-1], ValueError, "latents: expected numbers from 0 to 63, got -1"),
        ([True], TypeError, "latents: expected whole numbers, got True"),
        (["1"], TypeError, "latents: expected whole numbers, got '1'"),
    ],
    ids=["none", "twice", "large", "negative", "bool", "text"],
)
def test_latents_that_there_are_not_are_refused_at_once(pipe, latents, kind, message):
    with pytest.raises(kind, match=message):
        compute_examples(pipe, toy.eraser(), latents, PROMPTS, steps=1, cancelled=never)


def test_without_prompts_there_is_nothing_to_look_at(pipe):
    with pytest.raises(ValueError, match="prompts: expected one or more"):
        compute_examples(pipe, toy.eraser(), [0], [], steps=1, cancelled=never)


@pytest.mark.parametrize(
    ("place", "around", "box"),
    [
        ((0, 0), 0, (0, 0, 20, 10)),
        ((2, 4), 0, (80, 20, 100, 30)),
        ((1, 2), 1, (20, 0, 80, 30)),
        ((0, 0), 1, (0, 0, 60, 30)),
        ((2, 4), 1, (40, 0, 100, 30)),
        ((1, 2), 9, (0, 0, 100, 30)),
    ],
    ids=["first", "last", "middle", "corner", "other-corner", "all"],
)
def test_a_crop_is_of_the_patch_and_those_around_it(place, around, box):
    picture = Image.new("RGB", (100, 30))
    example = LatentExample(0, 1.0, 5.0, *place, (3, 5), PROMPTS[0], picture)
    assert example.box(around) == box
    assert example.crop(around).size == (box[2] - box[0], box[3] - box[1])


def test_a_frame_is_drawn_on_a_copy():
    picture = Image.new("RGB", (100, 30))
    example = LatentExample(0, 1.0, 5.0, 1, 2, (3, 5), PROMPTS[0], picture)
    framed = example.framed()
    assert framed.getpixel((40, 10)) == framed.getpixel((59, 19)) == (255, 255, 255)
    assert framed.getpixel((50, 15)) == framed.getpixel((39, 10)) == (0, 0, 0)
    assert picture.getcolors() == [(3000, (0, 0, 0))]


def test_what_is_stored_is_read_again(pipe, tmp_path):
    eraser = toy.eraser(k=4)
    *_, found = compute_examples(pipe, eraser, range(64), PROMPTS, steps=STEPS, guidance=3.0, cancelled=never)
    sampling = canvas.KINDS["saeuron"]
    pictures = [Image.new("RGB", (16, 24), (40 * n, 200 - 40 * n, 90)) for n in range(len(PROMPTS))]
    write_sheet(tmp_path, sampling, PROMPTS, pictures)
    write_firings(tmp_path, "saeuron", eraser, found)
    read = stored_for(Steering.from_eraser(eraser, strength=-1.0), tmp_path)
    assert stored_for(toy.eraser(k=5), tmp_path) is None
    assert list(read.prompts) == PROMPTS and read.grid == (4, 4)
    for latent in range(64):
        for mine, stored in zip(found.of(latent), read.of(latent), strict=True):
            assert replace(stored, value=mine.value, picture=mine.picture) == mine
            assert stored.value == pytest.approx(mine.value, rel=1e-3)
            colour = torch.tensor(stored.picture.getpixel((8, 12)))
            wanted = torch.tensor(pictures[PROMPTS.index(mine.prompt)].getpixel((8, 12)))
            assert (colour - wanted).abs().max() <= 4


def test_of_an_eraser_without_stored_examples_there_are_none():
    assert examples(toy.eraser(), 0) is None
    with pytest.raises(ValueError, match="latents: expected numbers from 0 to 63"):
        examples(toy.eraser(), 64)


@pytest.mark.parametrize("kind", list(canvas.KINDS))
def test_every_latent_of_a_concept_has_stored_examples_of_that_concept(kind):
    eraser, right = canvas.load_eraser(kind), []
    for row in concept_table(eraser):
        for latent in row.latents:
            found = examples(eraser, latent)
            assert 1 <= len(found) <= TOP and found[0].grid == (8, 8)
            values = [example.value for example in found]
            assert values == sorted(values, reverse=True) and values[-1] > 0
            assert found[0].crop().size == (48, 48) and found[0].timestep in eraser.dictionary.timesteps
        best = examples(eraser, curves(eraser, row.concept)[0].latent)
        right.append(best[0].prompt.concept == row.concept)
    assert sum(right) >= 15, right


def test_stored_examples_are_what_the_pipeline_gives():
    """The strongest ones of a few latents, computed again from their prompts."""
    eraser = canvas.load_eraser("sdxl")
    latents = [curves(eraser, name)[0].latent for name in ("Cats", "Towers", "Flame")]
    stored = [examples(eraser, latent)[0] for latent in latents]
    prompts = list(dict.fromkeys(example.prompt for example in stored))
    *_, found = compute_examples(
        canvas.load_pipeline(),
        eraser,
        latents,
        prompts,
        steps=canvas.KINDS["sdxl"].steps,
        guidance=canvas.KINDS["sdxl"].guidance,
        cancelled=never,
    )
    assert isinstance(found, ExampleSet)
    for example in stored:
        again = next(e for e in found.of(example.latent) if e.prompt == example.prompt)
        assert again.value == pytest.approx(example.value, rel=0.02)
        difference = [torch.tensor(list(e.crop().tobytes())).float() for e in (again, example)]
        assert (difference[0] - difference[1]).abs().mean() < 12


def test_stored_examples_are_small_and_of_pictures_that_nothing_else_is_of():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    sheets = [path.name for path in files if path.name.startswith("pictures-")]
    assert len(sheets) == len(set(canvas.KINDS.values()))
    for name in sheets:
        seeds = [prompt.seed for prompt in read_sheet(FOLDER, name).prompts]
        assert len(set(seeds)) == len(seeds) and min(seeds) > 100_000_000
