"""How UnlearnCanvas is scored where that is a choice: JPEG files, CRA of erased styles, what the Frechet distance is
of."""

import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lbdt.evaluation.evaluated_world import Verdicts
from lbdt.evaluation.jobs import Job, unedited
from lbdt.evaluation.metrics.feature_distances import frechet_distance
from lbdt.evaluation.request import EvaluationSubject
from lbdt.evaluation.verdict_columns import VerdictColumns, figures
from lbdt.evaluation.worlds import unlearncanvas as uc
from lbdt.evaluation.worlds.jpeg import JpegJudge, through_jpeg
from lbdt.evaluation.worlds.unlearncanvas import OBJECTS, PHOTO, STYLES, THEMES, unlearncanvas


def world(**settings):
    return unlearncanvas(**{"base": "owner/base", "erasers": {"saeuron": "owner/eraser"}} | settings)


def noisy(size=(24, 17), mode="RGB"):
    values = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(values.to(torch.uint8).numpy()).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_what_a_saved_file_gives_back(tmp_path, mode):
    picture = noisy(mode=mode)
    picture.convert("RGB").save(tmp_path / "a.jpg")  # as the scripts: no quality is named
    before = picture.tobytes()
    got = through_jpeg(picture)
    assert got.mode == "RGB" and got.size == picture.size and picture.tobytes() == before
    assert (
        got.tobytes()
        == Image.open(tmp_path / "a.jpg").convert("RGB").tobytes()
        != picture.convert("RGB").tobytes()
    )


def test_a_judge_of_jpeg_files_sees_them_and_keeps_its_verdicts_under_another_name():
    class Sees:
        name, features_name, single_label = "eye", "pixels", True

        def __call__(self, pictures):
            flat = [torch.from_numpy(np.array(each)).float().flatten() for each in pictures]
            return Verdicts(torch.zeros(len(pictures), 1, dtype=torch.bool), None, torch.stack(flat))

    judge = JpegJudge(Sees())
    assert judge.name != Sees.name and judge.features_name != Sees.features_name and judge.single_label
    data = io.BytesIO()
    noisy().save(data, format="JPEG")
    assert torch.equal(judge([noisy()]).features, Sees()([Image.open(data)]).features)


@pytest.mark.parametrize(
    ("settings", "cra", "compared", "words"),
    [
        pytest.param({}, "named", STYLES, "JPEG files of quality 75", id="objects"),
        pytest.param({"template": "official"}, "named", STYLES, "style accuracy", id="objects-official"),
        pytest.param({"task": "style"}, "unnamed", None, "over prompts that name no style", id="styles"),
        pytest.param(
            {"task": "style", "template": "official"}, "all", None, "of every kind", id="styles-official"
        ),
        pytest.param(
            {"task": "style", "cra": "named"}, "named", None, "that name a style", id="styles-named"
        ),
        pytest.param({"judged": "png", "compared": "others"}, "named", None, "as they are", id="others"),
    ],
)
def test_the_published_rules_are_the_defaults_and_the_report_says_which(settings, cra, compared, words):
    found = world(**settings)
    assert (found.cra, found.compared, found.noise.name) == (cra, compared, "run") and words in found.rules
    assert world(**settings, noise="prompt").noise is None


def test_the_command_line_s_names_reach_the_world():
    subject = EvaluationSubject("unlearncanvas", model="m", erasers={"saeuron": "e"}, task="style")
    assert subject.load().rules == world(task="style").rules and subject.load().noise is not None
    given = {"noise": "prompt", "judged": "png", "cra": "all", "compared": "others"}
    changed = dataclasses.replace(subject, **given).load()
    assert changed.noise is None and changed.cra == "all"
    assert changed.rules == world(task="style", **given).rules != subject.load().rules


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"cra": "all"}, "cra: expected one of named; got 'all'", id="cra-of-objects"),
        pytest.param({"task": "style", "cra": "x"}, "cra: expected one of named, unnamed, all", id="cra"),
        pytest.param({"noise": "x"}, "noise: expected one of run, prompt", id="noise"),
        pytest.param({"judged": "gif"}, "judged: expected one of jpeg, png", id="judged"),
        pytest.param({"compared": "x"}, "compared: expected one of styled, others", id="compared"),
    ],
)
def test_other_rules_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        world(**settings)


def test_the_official_template_runs_over_51_themes_and_no_plain_prompt():
    rows = uc.prompts(188, "object", "official")
    assert len(rows) == len({row.text for row in rows}) == 1020
    assert Counter(row.style for row in rows) == dict.fromkeys(THEMES, 20)
    assert sum(row.text.endswith(" image in Photo style.") for row in rows) == 20
    assert rows[38].style == PHOTO and rows[38].text == "A Architectures image in Photo style."


@pytest.mark.parametrize(
    ("template", "text"),
    [("saeuron", "An image of Cats."), ("official", "A Cats image in Photo style.")],
)
def test_styles_are_erased_beside_twenty_pictures_of_none(template, text):
    found = world(task="style", template=template)
    rows = found.empty(42)
    assert [row.style for row in rows] == list(OBJECTS) and {(row.concept, row.seed) for row in rows} == {
        (None, 42)
    }
    assert rows[OBJECTS.index("Cats")].text == text
    assert len(found.prompts(42)) == 1000 and {row.concept for row in found.prompts(42)} == set(STYLES)
    assert world(template=template).empty is None


def columns(jobs, seen_styles, objects, features=None):
    """Verdicts on `jobs`: the prompt's own object is seen, and these styles."""
    seen = torch.zeros(len(jobs), objects, dtype=torch.bool)
    count = len(jobs)
    return VerdictColumns(
        {job: place for place, job in enumerate(jobs)},
        seen,
        torch.tensor(seen_styles),
        features,
        None,
        None,
        torch.zeros(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        True,
    )


@pytest.mark.parametrize(
    ("cra", "wanted"),
    [
        # 20 pictures of Monet, every object right; 980 of other styles, all wrong; 20 plain, half of them right.
        pytest.param("named", 100 / 50, id="named"),
        pytest.param("unnamed", 50.0, id="unnamed"),
        pytest.param("all", (20 + 10) / 10.20, id="all"),
    ],
)
def test_cra_of_an_erased_style(cra, wanted):
    subject = world(task="style", cra=cra)
    prompts = [*subject.prompts(188), *subject.empty(188)]
    jobs = [Job(prompt, ("Monet",)) for prompt in prompts]
    right = [job.own or (job.empty and OBJECTS.index(job.prompt.style) < 10) for job in jobs]
    own = [OBJECTS.index(job.prompt.style) for job in jobs]
    seen = [place if good else (place + 1) % 20 for place, good in zip(own, right, strict=True)]
    got = figures(subject, {188: jobs}, columns(jobs, seen, 50), None, True)
    assert got.by_seed[0]["CRA"] == pytest.approx(wanted) == got.concepts["Monet"]["CRA"]
    bare = list(dict.fromkeys(map(unedited, jobs)))
    base = figures(subject, {188: jobs}, columns(bare, seen, 50), None, False)
    assert base.by_seed[0]["CRA"] == pytest.approx(wanted)
    # The base's row shows this under CRA: every unedited picture once.
    styled = {"unnamed": 50.0}.get(cra, 100 * 30 / 1020)
    assert base.by_seed[0]["style seen"] == pytest.approx(styled)


def test_without_a_picture_that_names_no_style_there_is_no_such_cra():
    subject = world(task="style")
    jobs = [Job(prompt, ("Monet",)) for prompt in subject.prompts(188)]
    for rule, there in (("unnamed", False), ("all", False), ("named", True)):
        ruled = dataclasses.replace(subject, cra=rule)
        got = figures(ruled, {188: jobs}, columns(jobs, [0] * 1000, 50), None, True).by_seed[0]
        assert (got["CRA"] is not None) == there


@pytest.mark.parametrize("template", ["saeuron", "official"])
def test_the_frechet_distance_leaves_out_the_target_photographs_and_what_has_no_style(template):
    for compared in ("styled", "others"):
        subject = world(template=template, compared=compared)
        jobs = [Job(prompt, ("Cats",)) for prompt in subject.prompts(188)]
        bare = list(map(unedited, jobs))
        generator = torch.Generator().manual_seed(3)
        features = [torch.rand(len(jobs), 3, generator=generator) for _ in range(2)]
        got, base = (
            columns(rows, [0] * len(jobs), 20, x) for rows, x in zip((jobs, bare), features, strict=True)
        )
        distance = figures(subject, {188: jobs}, got, base, True).by_seed[0]["FD"]
        kept = torch.tensor(
            [
                job.prompt.concept != "Cats"
                and (compared == "others" or job.prompt.style not in (PHOTO, None))
                for job in jobs
            ]
        )
        assert int(kept.sum()) == (19 * 50 if compared == "styled" else 19 * 51)
        assert distance == pytest.approx(frechet_distance(features[0][kept], features[1][kept]))
