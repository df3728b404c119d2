"""A world of a user's prompt file, a folder's pipeline and eraser, and a CLIP folder as its judge."""

import json

import pytest
import torch
from PIL import Image

from lbdt.evaluation.metrics.clip import Clip
from lbdt.evaluation.worlds.prompt_world import ClipJudge, prompt_world
from tests import toy
from tests.evaluation.test_clip import pictures, tiny_clip
from tests.repeats import repeats

CPU = torch.device("cpu")
ROWS = [
    {"prompt": "a cat", "concept": "Cats", "style": "oil_paint", "seed": 7},
    {"prompt": "a cat", "concept": "Cats", "seed": 9},
    {"prompt": "a dog", "concept": "Dogs", "style": "ink", "seed": 7},
    {"prompt": "dogs", "concept": "Dogs", "style": "ink", "seed": 5},
    {"prompt": "a dog", "concept": "Dogs", "style": "ink", "seed": 8},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    toy.pipeline(folder / "tokenizer").save_pretrained(folder / "model")
    toy.eraser().save_pretrained(folder / "eraser", decoder=True)
    tiny_clip(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def world(folder, rows="rows.jsonl", **settings):
    settings = {"model": folder / "model", "erasers": {"mine": folder / "eraser"}, **settings}
    return prompt_world(folder / rows, **settings)


def test_concepts_and_styles_are_those_of_the_file_in_its_order(folder):
    found = world(folder, steering={"mine": folder / "eraser"}, strengths={"mine": [-1, -2]}, steps=7)
    assert (found.objects, found.styles) == (("Cats", "Dogs"), ("oil_paint", "ink"))
    assert (found.judge, found.scheduler) == (None, None)
    kind = found.kinds["mine"]
    assert (kind.steps, kind.guidance, kind.strengths) == (7, None, (-1, -2))
    assert kind.steering(strength=-2.0).strength == -2.0
    with pytest.raises(ValueError, match="no strength"):
        kind.steering()


def test_seeds_take_rows_of_the_same_labels_in_turn_and_none_starts_a_text_alike(folder):
    found = world(folder)
    assert (found.seeds, found.sweep_seeds) == ((0, 1, 2), (3,))
    full = [{"style": None, **row} for row in ROWS]
    assert [p.to_dict() for p in found.prompts(0)] == full[:3]
    # The seeds of the file span 5, so a second turn starts 5 later.
    assert [(p.text, p.seed) for p in found.prompts(1)] == [("a cat", 12), ("a cat", 14), ("dogs", 5)]
    assert [(p.text, p.seed) for p in found.prompts(5)] == [("a cat", 32), ("a cat", 34), ("a dog", 13)]
    scored = {p.to_dict()["seed"] for seed in found.seeds for p in found.prompts(seed)}
    assert {row["seed"] for row in ROWS} <= scored
    starts = [(p.text, p.seed) for seed in range(30) for p in found.prompts(seed)]
    assert len(set(starts)) == len(starts) == 90
    labels = [(p.concept, p.style) for p in found.prompts(4)]
    assert len(set(labels)) == len(labels), "one prompt per object and style"


def test_the_judge_takes_the_nearest_text(folder):
    judge = world(folder, clip=folder / "clip").judge(CPU)
    clip = Clip.from_pretrained(folder / "clip")
    given = pictures(9)
    seen = clip.pictures(given)
    verdicts = judge(given)
    things = clip.texts(["An image of Cats", "An image of Dogs"])
    looks = clip.texts(["oil paint style", "ink style"])
    for i in range(len(given)):
        scores = [float(seen[i] @ text) for text in things], [float(seen[i] @ text) for text in looks]
        assert verdicts.objects[i].tolist() == [score == max(scores[0]) for score in scores[0]]
        assert verdicts.styles[i] == scores[1].index(max(scores[1]))
    assert repeats(verdicts.features, seen)
    assert "clip" in judge.name and "CLIP image embedding" in judge.features_name


def test_a_picture_on_a_name_s_text_is_called_by_that_name(folder, monkeypatch):
    clip = Clip.from_pretrained(folder / "clip")
    names = ("a", "b_c", "z")
    judge = ClipJudge(clip, names, ())
    monkeypatch.setattr(clip, "pictures", lambda given: clip.texts([f"An image of {name}" for name in given]))
    verdicts = judge(["z", "a", "b c", "z"])
    assert verdicts.objects.int().argmax(1).tolist() == [2, 0, 1, 2] and verdicts.styles is None
    assert (verdicts.objects.sum(1) == 1).all()


def test_the_whole_path_runs(folder):
    found = world(folder, clip=folder / "clip", steps=2)
    pipe, judge, kind = found.pipeline(CPU), found.judge(CPU), found.kinds["mine"]
    rows = found.prompts(1)
    with kind.per().attach(pipe, concepts=["Cats"], seed=[row.seed for row in rows]):
        made = pipe(
            [row.text for row in rows],
            num_inference_steps=kind.steps,
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        ).images
    verdicts = judge(made)
    assert len(made) == len(verdicts.objects) == len(verdicts.features) == 3
    assert isinstance(made[0], Image.Image) and verdicts.objects.shape == (3, 2)


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        pytest.param('{"prompt": "a"}', {}, "'a' has no concept", id="unlabelled"),
        pytest.param(
            '{"prompt": "a", "concept": "c", "seed": 1}\n' * 2, {}, "'a' comes twice with seed 1", id="twice"
        ),
        pytest.param(
            '{"prompt": "a", "concept": "c", "beside": "d"}',
            {},
            "'a' has several concepts .c, d.",
            id="several",
        ),
        pytest.param("", {}, "holds no prompts", id="empty"),
        pytest.param(None, {"seeds": (0, 3)}, "none of them in sweep_seeds", id="seed-in-both"),
        pytest.param(None, {"seeds": (-1,)}, "expected some >= 0", id="negative-seed"),
        pytest.param(None, {"seeds": ()}, "expected some >= 0", id="no-seed"),
        pytest.param(None, {"steering": {"other": "x"}}, "no eraser of that name", id="steering"),
    ],
)
def test_refuses_what_cannot_be_evaluated(folder, rows, settings, words):
    if rows is not None:
        (folder / "bad.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=words):
        world(folder, "rows.jsonl" if rows is None else "bad.jsonl", **settings)
