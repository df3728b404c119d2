"""The UnlearnCanvas world: its prompts and names, and the whole path to scored pictures on tiny random models."""

from collections import Counter

import pytest
import torch
from PIL import Image

from lbdt.activations.prompts import Prompt
from lbdt.editors import Steering
from lbdt.evaluation.worlds import STRENGTHS
from lbdt.evaluation.worlds import unlearncanvas as uc
from lbdt.evaluation.worlds.unlearncanvas import (
    OBJECTS,
    PHOTO,
    STYLES,
    THEMES,
    find_classifier,
    prompt_text,
    unlearncanvas,
)
from tests import toy
from tests.evaluation import test_vit as tiny
from tests.repeats import repeats

COLOURS = ("red", "blue", "white", "black", "lime", "yellow")
THINGS = ("Cats", "Dogs", "Trees", "Cats", "Dogs", "Trees")
LOOKS = ("Van_Gogh", "Van_Gogh", "Van_Gogh", "Winter", "Winter", PHOTO)
CPU = torch.device("cpu")


def planted(path, names, answers) -> None:
    """A random ViT that calls a picture of the i-th colour `answers[i]`."""
    solid = [Image.new("RGB", (tiny.SIDE, tiny.SIDE), colour) for colour in COLOURS]
    state = tiny.state(len(names))
    state["cls_token"] *= 0.1
    token = tiny.timm_forward(state, tiny.preprocess(solid, tiny.SIDE))[1]
    wanted = torch.zeros(len(names), len(solid), dtype=torch.float64)
    for i, answer in enumerate(answers):
        wanted[names.index(answer), i] = 1
    state["head.weight"] = (wanted @ torch.linalg.pinv(token.T)).float()
    state["head.bias"] = torch.zeros(len(names))
    torch.save({"model_state_dict": state}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, eraser/ with steering beside it, and classifiers/ under their published names."""
    folder = tmp_path_factory.mktemp("unlearncanvas")
    toy.pipeline(folder / "tokenizer").save_pretrained(folder / "base")
    eraser = toy.eraser()
    eraser.save_pretrained(folder / "eraser", decoder=True)
    Steering.from_eraser(eraser, strength=-1.0).save_settings(folder / "eraser")
    (folder / "classifiers").mkdir()
    planted(folder / "classifiers/style50_cls.pth", OBJECTS, THINGS)
    planted(folder / "classifiers/style50.pth", THEMES, LOOKS)
    return folder


def world(folder, **settings):
    settings = {
        "base": folder / "base",
        "erasers": {"saeuron": folder / "eraser"},
        "steering": {"saeuron": folder / "eraser"},
        "object_classifier": folder / "classifiers",
        "style_classifier": folder / "classifiers",
        "size": 16,
        **settings,
    }
    return unlearncanvas(**settings)


def test_the_classes_are_the_published_ones_in_index_order():
    assert (len(OBJECTS), len(THEMES), len(STYLES)) == (20, 51, 50)
    assert list(OBJECTS) == sorted(OBJECTS) and list(THEMES) == sorted(THEMES)
    assert THEMES.index(PHOTO) == 38 and PHOTO not in STYLES and set(STYLES) < set(THEMES)
    assert (OBJECTS.index("Human"), THEMES.index("Van_Gogh")) == (11, 45)


@pytest.mark.parametrize(
    ("template", "style", "text"),
    [
        pytest.param("saeuron", "Van_Gogh", "An image of Cats in Van Gogh style.", id="saeuron"),
        pytest.param("saeuron", None, "An image of Cats.", id="saeuron-plain"),
        pytest.param("saeuron", PHOTO, "An image of Cats in Seed Images style.", id="saeuron-photo"),
        pytest.param("official", "Red_Blue_Ink", "A Cats image in Red Blue Ink style.", id="official"),
        pytest.param("official", PHOTO, "A Cats image in Photo style.", id="official-photo"),
    ],
)
def test_prompts_are_the_published_ones(template, style, text):
    assert prompt_text("Cats", style, template) == text


def test_a_seed_of_the_object_task_has_1020_prompts_and_all_carry_it():
    rows = uc.prompts(188)
    assert len(rows) == len({row.text for row in rows}) == 1020
    assert {row.seed for row in rows} == {188}
    assert Counter(row.concept for row in rows) == dict.fromkeys(OBJECTS, 51)
    assert Counter(row.style for row in rows) == {**dict.fromkeys(STYLES, 20), None: 20}
    assert rows[0] == Prompt("An image of Architectures in Abstractionism style.", OBJECTS[0], STYLES[0], 188)


def test_the_style_task_swaps_the_roles(folder):
    swapped = world(folder, task="style")
    rows = swapped.prompts(42)
    assert (swapped.objects, swapped.styles) == (STYLES, OBJECTS)
    assert len(rows) == 1000 and {row.style for row in rows} == set(OBJECTS)
    assert rows[0].text == uc.prompts(42)[0].text
    judge = swapped.judge(CPU)
    verdicts = judge([Image.new("RGB", (16, 16), colour) for colour in COLOURS])
    assert verdicts.styles.tolist() == [OBJECTS.index(name) for name in THINGS]
    # The photo class is none of the styles that may be erased.
    found = [row.nonzero().flatten().tolist() for row in verdicts.objects]
    assert found == [[STYLES.index(n)] if n != PHOTO else [] for n in LOOKS]
    assert verdicts.objects.shape == (len(LOOKS), len(STYLES))


def test_the_published_sampling_is_the_default(folder):
    found = unlearncanvas(base="owner/base", erasers={"saeuron": "owner/eraser", "gsae": "owner/other"})
    assert found.seeds == (188, 288, 588, 688, 888) and found.sweep_seeds == (42,)
    assert {(kind.steps, kind.guidance) for kind in found.kinds.values()} == {(100, 9.0)}
    assert found.judge is None and found.kinds["gsae"].steering is None
    assert (found.objects, found.styles) == (OBJECTS, THEMES)
    assert (
        world(folder).kinds["saeuron"].strengths == STRENGTHS["saeuron"] == (-1, -5, -10, -15, -20, -25, -30)
    )
    assert world(folder, strengths={"saeuron": [-2.0]}).kinds["saeuron"].strengths == (-2.0,)


def test_the_whole_path_runs_on_random_weights(folder, tmp_path):
    subject = world(folder)
    pipe = subject.pipeline(CPU)
    pipe.scheduler = subject.scheduler(pipe)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.safety_checker is None
    judge = subject.judge(CPU)
    rows = [p for p in subject.prompts(188) if p.concept in toy.CONCEPTS and p.style in ("Monet", None)]
    assert len(rows) == 6
    kind, seen = subject.kinds["saeuron"], {}
    methods = {"per": kind.per(padding=0, source="nearest"), "steering": kind.steering(strength=-5.0)}
    assert (methods["per"].padding, methods["per"].source) == (0, "nearest")
    assert methods["steering"].strength == -5.0
    for name, method in methods.items():
        with method.attach(pipe, concepts=["Cats"], seed=[p.seed for p in rows]):
            generators = [torch.Generator().manual_seed(p.seed) for p in rows]
            pictures = pipe(
                [p.text for p in rows],
                num_inference_steps=2,
                guidance_scale=kind.guidance,
                generator=generators,
            ).images
        seen[name] = judge(pictures)
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / f"{name}{number}.png")
    for name, verdicts in seen.items():
        again = judge([Image.open(tmp_path / f"{name}{number}.png") for number in range(len(rows))])
        assert torch.equal(again.objects, verdicts.objects) and torch.equal(again.styles, verdicts.styles)
        assert repeats(again.features, verdicts.features)
        assert verdicts.features.shape == (6, tiny.WIDTH) and verdicts.objects.dtype == torch.bool


@pytest.mark.parametrize("template", ["saeuron", "official"])
@pytest.mark.parametrize(("task", "concept"), [("object", "Cats"), ("style", "Monet")])
def test_the_evaluation_runs_on_it(folder, tmp_path, monkeypatch, task, concept, template):
    from lbdt.evaluation.evaluation import Evaluation
    from lbdt.evaluation.jobs import Design
    from lbdt.evaluation.verdict_columns import Scorers, figures

    monkeypatch.setattr(toy, "CONCEPTS", ("Cats", "Monet", "Winter"))
    eraser = toy.eraser()
    eraser.save_pretrained(tmp_path / "eraser", decoder=True)
    Steering.from_eraser(eraser, strength=-1.0).save_settings(tmp_path / "eraser")
    paths = dict.fromkeys(("erasers", "steering"), {"saeuron": tmp_path / "eraser"})
    subject = world(folder, task=task, template=template, steps=10, seeds=(188,), **paths)
    design = Design(1, 1, 1, 1, strengths=1, ablation_own=1, ablation_others=1, counts=())
    judge = subject.judge(CPU)
    run = Evaluation(
        subject,
        ["saeuron"],
        design,
        tmp_path / "out",
        CPU,
        subject.seeds,
        subject.sweep_seeds,
        (concept,),
        scorers=Scorers(judge),
        progress=False,
    )
    strength, plan = run.run()["saeuron"], run.plans["saeuron"]
    assert strength in STRENGTHS["saeuron"]
    assert {job.prompt.seed for job in plan.scored_jobs[188]} == {188}
    assert run.about()["noise"] == "run" and "JPEG" in run.about()["rules"] and "JPEG" in run.about()["judge"]
    for series in plan.scored(strength):
        row = figures(subject, plan.scored_jobs, run.columns(series), None, series.method != "base")
        # One picture of the erased concept and one of another: each classifier is right or wrong.
        assert {row.by_seed[0][name] for name in ("UA", "IRA")} <= {0.0, 100.0}
        # Of styles one more, of none: CRA's.
        assert row.by_seed[0]["CRA"] is not None and row.pictures == (2 if task == "object" else 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"task": "objects"}, "task: expected one of object, style", id="task"),
        pytest.param({"template": "mine"}, "template: expected one of saeuron, official", id="template"),
        pytest.param({"style_classifier": None}, "expected both", id="one-classifier"),
        pytest.param({"erasers": {}}, "erasers: expected one or more", id="no-eraser"),
        pytest.param({"steering": {"gsae": "x"}}, "steering: gsae: no eraser of that name", id="steering"),
        pytest.param(
            {"strengths": {"sdxl": [1]}}, "strengths: sdxl: no steering of that name", id="strengths"
        ),
        pytest.param({"seeds": (42, 1)}, "none of them in sweep_seeds", id="seeds"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(folder, settings, words):
    with pytest.raises(ValueError, match=words):
        world(folder, **settings)


def test_what_is_not_the_protocol_s_is_refused_when_it_is_loaded(folder):
    with pytest.raises(ValueError, match="generates 16 x 16 pixels; the protocol has 512"):
        world(folder, size=512).pipeline(CPU)
    swapped = world(
        folder,
        object_classifier=folder / "classifiers/style50.pth",
        style_classifier=folder / "classifiers/style50_cls.pth",
    )
    with pytest.raises(ValueError, match="style50.pth: expected a classifier of 20 classes, got 51"):
        swapped.judge(CPU)
    with pytest.raises(ValueError, match="expected a file style50.safetensors or style50.pth"):
        find_classifier(folder / "base", "style50")
    with pytest.raises(TypeError, match="strength: expected some of padding, source, avoid, min_patches"):
        world(folder).kinds["saeuron"].per(strength=1)
