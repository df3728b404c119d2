"""Latents that were assigned to concepts in training: selected, calibrated, ranked, saved and merged."""

import json

import pytest
import torch

from lbdt.dictionary import Calibration, ConceptDictionary, ConceptStatistics
from lbdt.dictionary.activation_histograms import spaced_edges
from lbdt.dictionary.scoring import score
from lbdt.editors import ConceptEraser
from tests.dictionary.activations import CONCEPTS, LATENTS, SITE, in_memory, make_sae

# Latents 0, 1 and 2 fire for their concepts; 9 does for none in particular.
ASSIGNED = {"Cats": 0, "Trees": 9}


@pytest.fixture(scope="module")
def scored():
    return score(in_memory(), SITE, make_sae(), assigned={**ASSIGNED, "Birds": 5}, progress=False)


def test_the_assigned_latent_is_a_candidate_whatever_it_scores(scored):
    h, plain = scored.histograms, scored.scores().topk(4).indices
    assert scored.assigned == ASSIGNED
    assert (h.candidates == torch.tensor([0, -1, 9]).view(3, 1, 1)).any(-1).tolist() == [
        [True] * 3,
        [False] * 3,
        [True] * 3,
    ]
    assert torch.equal(h.candidates[:2], plain[:2])
    assert torch.equal(h.candidates[2, :, :3], plain[2, :, :3])


@pytest.mark.parametrize("thresholds", ["published", "calibrated"])
@pytest.mark.parametrize("asked", [None, True], ids=["by default", "asked for"])
def test_it_is_selected_at_every_timestep(scored, thresholds, asked):
    for name, latent in ASSIGNED.items():
        selection = scored.select(name, assigned=asked, thresholds=thresholds, false_positive=0.2)
        assert selection.latents.tolist() == [latent] and selection.thresholds.shape == (3, 1)
        assert torch.isfinite(selection.thresholds).all() and selection.kind == thresholds
        published = scored.published_thresholds()[:, [latent]]
        if thresholds == "published":
            assert torch.equal(selection.thresholds, published)
        else:
            assert (selection.thresholds >= published).all()
            assert (scored.detection_rates(selection).off <= 0.2).all()


def test_other_criteria_pass_over_the_assignment(scored):
    plain = scored.replaced(assigned=None)
    for options in ({"top_k": 1}, {"top_k": 2}, {"percentile": 90}):
        assert torch.equal(scored.select("Cats", **options).latents, plain.select("Cats", **options).latents)
    assert torch.equal(scored.select("Cats", assigned=False).thresholds, plain.select("Cats").thresholds)
    assert torch.equal(scored.select("Dogs").thresholds, plain.select("Dogs").thresholds)


def test_a_percentile_does_not_take_the_assigned_latent_for_a_good_one(scored):
    # 4 latents are above: the fourth best made way for the assigned one.
    with pytest.raises(
        ValueError, match="4 latents wanted at a timestep, but the calibration keeps 3 candidates"
    ):
        scored.select("Trees", percentile=85)


@pytest.mark.parametrize(
    ("concept", "options", "message"),
    [
        ("Dogs", {"assigned": True}, "no latent is assigned to 'Dogs' .assigned: Cats, Trees"),
        ("Cats", {"assigned": True, "top_k": 1}, "give percentile, top_k or assigned, one of them"),
    ],
)
def test_bad_selections(scored, concept, options, message):
    with pytest.raises(ValueError, match=message):
        scored.select(concept, **options)


def test_ranks_are_by_the_score_averaged_over_timesteps(scored):
    mean = scored.scores().mean(1)
    assert scored.assigned_ranks() == {"Cats": 0, "Trees": int((mean[2] > mean[2, 9]).sum())}
    assert scored.assigned_ranks()["Trees"] > 3
    assert scored.replaced(assigned=None).assigned_ranks() == {}


def test_it_is_saved_and_read(scored, tmp_path):
    scored.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "dictionary.json").read_text())["assigned"] == ASSIGNED
    back = ConceptDictionary.from_pretrained(tmp_path)
    assert back.assigned == ASSIGNED
    assert torch.equal(back.select("Trees").thresholds, scored.select("Trees").thresholds)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_files_of_earlier_versions_are_read(scored, tmp_path, version):
    scored.replaced(fired=None, gate=None).save_pretrained(tmp_path)
    info = json.loads((tmp_path / "dictionary.json").read_text())
    for name in ("fired", "assigned", "gate", "site")[version - 1 :]:
        del info[name]
    (tmp_path / "dictionary.json").write_text(json.dumps(info | {"version": version}))
    back = ConceptDictionary.from_pretrained(tmp_path)
    assert back.assigned == (ASSIGNED if version >= 3 else None) and back.gate is None and back.site is None


@pytest.mark.parametrize(
    ("assigned", "message"),
    [
        ([], "assigned: expected an object"),
        ({"Birds": 1}, "assigned: unknown concept Birds"),
        ({"Cats": -1}, "assigned: expected a latent in"),
        ({"Cats": True}, "assigned: expected a latent in"),
        ({"Cats": 1, "Dogs": 1}, "latent 1 belongs to both"),
    ],
    ids=["list", "unknown", "negative", "bool", "twice"],
)
def test_bad_files(scored, tmp_path, assigned, message):
    scored.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "dictionary.json").read_text())
    (tmp_path / "dictionary.json").write_text(json.dumps(info | {"assigned": assigned}))
    with pytest.raises(ValueError, match=message):
        ConceptDictionary.from_pretrained(tmp_path)


def test_merging_joins_assignments_and_refuses_other_latents(scored):
    plain = scored.without_histograms()
    other = plain.replaced(assigned={"Dogs": 1, "Cats": 0})
    assert plain.merge(other).assigned == {"Cats": 0, "Dogs": 1, "Trees": 9}
    assert plain.merge(plain.replaced(assigned=None)).assigned == ASSIGNED
    with pytest.raises(ValueError, match="cannot merge: other latents are assigned to Cats"):
        plain.merge(plain.replaced(assigned={"Cats": 4}))


def test_an_eraser_takes_the_assignment(scored, tmp_path):
    eraser = ConceptEraser(make_sae(), scored, SITE.hookpoint, selection={"assigned": True})
    eraser.save_pretrained(tmp_path)
    assert ConceptEraser.from_pretrained(tmp_path).select("Cats").latents.tolist() == [0]
    with pytest.raises(ValueError, match="unknown key assign;"):
        ConceptEraser(make_sae(), scored, SITE.hookpoint, selection={"assign": True})


@pytest.mark.parametrize("peak", [0.3, 0.9, 0.999, 1.0])
def test_logit_edges_are_as_fine_near_one_as_near_zero(peak):
    edges = spaced_edges(peak, 256, "logit")
    assert edges[0] == 0 and float(edges[-1]) == torch.tensor(peak).float() and (edges.diff() > 0).all()
    inner = edges[1:][edges[1:] < 1 - 1e-4].double().logit()
    steps = inner.diff()
    # Equal steps of the pre-activation, but for the rounding of edges to float32.
    assert float(steps.max() / steps.min()) < 1.05
    assert len(edges) > 200


def test_log_edges_are_too_coarse_near_one():
    log, logit = (spaced_edges(0.9999, 256, spacing) for spacing in ("log", "logit"))
    near = lambda edges: int(((edges > 0.95) & (edges < 1)).sum())  # noqa: E731
    assert near(log) < 5 < 50 < near(logit)


def test_the_histograms_of_a_sigmoid_tell_apart_what_is_near_one():
    sae = make_sae("topk_sigmoid")
    dictionary = score(in_memory(), SITE, sae, assigned={"Cats": 0}, progress=False)
    edges = dictionary.histograms.edges
    assert dictionary.peak <= 1 and float(edges[-1]) == torch.tensor(dictionary.peak).float()
    selection = dictionary.select("Cats", false_positive=0.1, allow_below_published=True)
    limits = sae.to_pre_activation(selection.thresholds, selection.latents)
    assert torch.isfinite(limits).all()
    assert dictionary.histograms.candidates.max() < LATENTS and dictionary.concepts == CONCEPTS


def test_logit_edges_are_for_activations_up_to_one():
    statistics = ConceptStatistics(CONCEPTS, (1,), 2)
    for place in range(3):
        code = torch.full((1, 1, 1), 1.5), torch.zeros(1, 1, 1, dtype=torch.int64)
        statistics.add(place, 0, code)
    with pytest.raises(ValueError, match="for activations of a sigmoid, at most 1; got a peak of 1.5"):
        Calibration(statistics.build(), candidates=1, spacing="logit")
    with pytest.raises(ValueError, match="spacing: expected one of log, logit; got 'linear'"):
        Calibration(statistics.build(), candidates=1, spacing="linear")
