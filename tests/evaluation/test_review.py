"""What an evaluation must not get wrong in silence: labels that cannot differ, pictures that are not comparable, late
errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lbdt.editors import Steering
from lbdt.evaluation import request
from lbdt.evaluation.jobs import Design
from lbdt.evaluation.metrics.clip import Clip
from lbdt.evaluation.metrics.nudity import Detection
from lbdt.evaluation.report.tables import lines
from lbdt.evaluation.series import slug
from lbdt.evaluation.values import kind_values
from lbdt.evaluation.worlds.prompt_world import ClipJudge, prompt_world
from lbdt.evaluation.worlds.vit import ViTJudge
from lbdt.runs import extras
from tests import toy
from tests.evaluation import small
from tests.evaluation.test_clip import pictures, tiny_clip
from tests.evaluation.test_evaluate_command import settings

CPU = torch.device("cpu")
LOPSIDED = Design(own=2, others=1, sweep_own=1, sweep_others=1, ablation_own=1, ablation_others=0, counts=())


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def test_the_replaced_share_of_an_ablation_is_of_its_own_pictures_in_every_row(pipe, tmp_path):
    """The main row's batches hold pictures of other objects too, which no other padding's do."""
    world = small.world(judge=small.Judge(), pipeline=lambda device: pipe)
    found = small.evaluation(tmp_path, world, design=LOPSIDED, seeds=(1,))
    values = kind_values(found, "toy", found.run()["toy"])
    for row in values["padding"]:
        steps = values["ratio"][str(row["settings"]["padding"])]
        mean = sum(100 * step["replaced"] for step in steps) / len(steps)
        assert row["replaced"]["mean"] == pytest.approx(mean)
    main = {"padding": 1, "source": "random"}
    (padded,), (drawn,) = (
        [row["replaced"] for row in values[part] if row["settings"] == main]
        for part in ("padding", "sources")
    )
    assert padded == drawn


def test_nudity_is_counted_in_the_main_row_s_pictures_of_every_method(pipe, tmp_path, monkeypatch):
    from lbdt.evaluation.metrics import nudity

    # Ablations of two own pictures a concept, of which the main row has one.
    design = replace(LOPSIDED, own=1, ablation_own=2)
    world = small.world(judge=small.Judge(), pipeline=lambda device: pipe)
    found = small.evaluation(tmp_path, world, design=design, seeds=(1,))
    strengths = found.run()
    seen = Detection("BELLY_EXPOSED", 0.9)
    monkeypatch.setattr(nudity, "detect_nudity", lambda paths: ([[seen] for path in paths], "3"))
    counts = request._nudity(found, strengths, "saemnesia")["toy"]
    jobs = [job for part in found.plans["toy"].scored_jobs.values() for job in part]
    assert len(found.plans["toy"].scored(strengths["toy"])[-1].jobs) > len(jobs)
    assert counts["steering"]["pictures"] == counts["per"]["pictures"] == len(jobs)
    assert counts["base"]["pictures"] == len({job.prompt for job in jobs})
    assert {found["share"] for found in counts.values()} == {100.0}


def test_nudity_without_nudenet_is_refused_before_the_first_picture(tmp_path, monkeypatch):
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == "nudenet" else find(name)
    )
    given = settings(nudity="saemnesia", out=tmp_path / "out")
    with pytest.raises(ImportError, match=r"pip install lbdt\[nudity\]"):
        request.evaluate(given, processes=1, command="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("device", "most"), [("auto", 2), ("cuda", 2), ("cuda:1", 1)])
def test_more_processes_than_cuda_devices_are_refused(tmp_path, monkeypatch, device, most):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"--processes 3: expected at most {most}"):
        request.evaluate(settings(device=device, out=tmp_path / "out"), processes=3, command="")


def test_a_safety_checker_blackens_nothing(tmp_path):
    pipe = toy.pipeline(tmp_path)
    pipe.safety_checker = torch.nn.Identity()
    found = small.evaluation(tmp_path / "out", small.world(pipeline=lambda device: pipe))
    assert found.pipe.safety_checker is None


def test_a_judge_that_has_one_name_to_choose_from_is_none(tmp_path):
    tiny_clip(tmp_path)
    clip = Clip.from_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="expected two or more to choose from, got Cats"):
        ClipJudge(clip, ("Cats",), ("ink", "oil"))
    assert ClipJudge(clip, ("Cats", "Dogs"), ("ink",))(pictures(3)).styles is None
    assert ClipJudge(clip, ("Cats", "Dogs"), ("ink", "oil"))(pictures(3)).styles is not None
    rows = [{"prompt": "a cat", "concept": "Cats", "seed": seed} for seed in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": "m", "erasers": {"mine": "e"}, "clip": tmp_path / "clip"}
    assert prompt_world(tmp_path / "rows.jsonl", **given).judge is None


class Classifier:
    """Two classes and a feature, told apart by the name."""

    classes = 2

    def __init__(self, name: str, feature: float) -> None:
        self.name, self.feature = name, feature

    def __call__(self, given):
        return torch.eye(2)[: len(given)], torch.full((len(given), 1), self.feature)


@pytest.mark.parametrize(
    ("swapped", "feature", "name"),
    [(None, 2.0, "style classifier (themes)"), ({0: 0, 1: 1}, 1.0, "object classifier (things)")],
    ids=["objects-erased", "styles-erased"],
)
def test_features_are_of_the_classifier_that_does_not_know_what_is_erased(swapped, feature, name):
    judge = ViTJudge(Classifier("things", 1.0), Classifier("themes", 2.0), swapped)
    assert judge([None, None]).features.tolist() == [[feature]] * 2 and name in judge.features_name


def test_a_steering_that_cannot_be_used_is_refused_before_the_first_picture(tmp_path):
    def unsaved(**given):
        if not given:
            raise ValueError("no strength")
        return small.steering(**given)

    kinds = {"toy": small.kind(steering=unsaved, strengths=(-1.0,))}
    with pytest.raises(ValueError, match="no strength"):  # without a judge none is chosen
        small.evaluation(tmp_path / "out", small.world(tmp_path, kinds=kinds))

    class Partly(Steering):
        concepts = toy.CONCEPTS[1:]

    def partly(**given):
        return Partly.from_eraser(toy.eraser(), rule="sdxl", **{"strength": -1.0, **given})

    kinds = {"toy": small.kind(steering=partly)}
    with pytest.raises(ValueError, match=f"kind toy: its steering does not know {toy.CONCEPTS[0]}"):
        small.evaluation(tmp_path / "out", small.world(tmp_path, kinds=kinds))
    assert not (tmp_path / "out").exists()


def test_kinds_that_would_share_a_folder_are_refused(tmp_path):
    kinds = {name: small.kind(name) for name in ("my kind", "my-kind")}
    assert len({slug(name) for name in kinds}) == 1
    with pytest.raises(ValueError, match="my kind and my-kind would share the folder my-kind"):
        small.evaluation(tmp_path / "out", small.world(tmp_path, kinds=kinds))


def test_pictures_of_another_saved_strength_are_not_continued(pipe, tmp_path):
    def saved(strength):
        kinds = {
            "toy": small.kind(steering=lambda **given: small.steering(**{"strength": strength, **given}))
        }
        world = small.world(kinds=kinds, pipeline=lambda device: pipe)
        found = small.evaluation(tmp_path, world, design=LOPSIDED, seeds=(1,))
        return found.files(found.plans["toy"].scored(None)[2])

    saved(-1.0).prepare()
    saved(-1.0).prepare()
    with pytest.raises(ValueError, match=r"made otherwise \(strength differ\)"):
        saved(-2.0).prepare()


def test_the_terminal_s_table_has_clip_scores_where_they_were_measured():
    score = {"mean": 31.5, "low": None, "high": None, "seeds": 1}
    row = {"method": "per", "settings": {}, "pictures": 3, "UA": score}
    without, measured = ({"kinds": {"k": {"rows": [each]}}} for each in (row, row | {"CLIP": score}))
    assert lines(measured)[0].split()[-1] == "CLIP" and lines(measured)[1].split()[-1] == "31.5"
    assert lines(without)[0].split()[-1] == "FD"
