"""Supervised recipes on planted concepts: the assigned latent fires on the concept's patches, and there only."""

import pytest
import torch

from lbdt.activations import InMemory
from lbdt.activations.batches import Batches
from lbdt.sae import SAEConfig
from lbdt.training import (
    Assignment,
    Labels,
    Ranked,
    Supervision,
    assign,
    load_assignment,
    save_assignment,
    train,
)
from lbdt.training.recipe_training import assignment_of
from tests.training import planted

NAMES = (planted.CONCEPT_NAMES, planted.STYLE_NAMES)
CONSTRUCTION = Labels(*NAMES, Assignment.by_construction(*NAMES))


def fires(sae, source, latent):
    """Whether a latent is active, [prompts, T, M] bool; a sigmoid's activation counts from a half."""
    code = sae.encode(source.shard(0, planted.SITE).x)
    floor = 0.5 if sae.config.activation == "topk_sigmoid" else 0.2
    return ((code.indices == latent) & (code.values > floor)).any(-1)


def rates(sae, labels):
    """Shares of a concept's patches, and of all others, on which its latent fires; means over concepts."""
    held = planted.source(48, seed=9, timesteps=1)
    held.prompts_per_shard = 48
    on, off = [], []
    for number, name in enumerate(planted.CONCEPT_NAMES):
        fired = fires(sae, held, labels.assignment.concepts[name])
        has = held.where & (torch.arange(48) % planted.CONCEPTS == number).view(-1, 1, 1)
        on.append(float(fired[has].float().mean()))
        off.append(float(fired[~has].float().mean()))
    return sum(on) / len(on), sum(off) / len(off)


@pytest.mark.parametrize(
    ("config", "objective", "lr"),
    [
        ({"k": 6}, Ranked(supervision=Supervision(weight=0.3, pool=0.25, strength=2.0)), 1e-2),
        (
            {"k": 6, "activation": "topk_sigmoid", "normalize_decoder": False},
            Ranked(supervision=Supervision(weight=0.3, decorrelation=0.0, pool=0.25, strength=2.0)),
            1e-2,
        ),
    ],
    ids=["saemnesia", "gsae"],
)
def test_the_assigned_latent_fires_on_the_patches_of_its_concept(config, objective, lr):
    source = planted.source()
    config = SAEConfig(planted.D, 3 * planted.D, **config)
    batches = Batches(source, planted.SITE)
    seen = []
    sae = train(
        config,
        batches,
        300,
        objective=objective,
        labels=CONSTRUCTION,
        rows=256,
        lr=lr,
        progress=False,
        log=lambda step, values: seen.append(values),
    )
    on, off = rates(sae, CONSTRUCTION)
    assert on > 0.9
    assert off < 0.02
    assert seen[-1]["assignment"] < 0.3 * seen[0]["assignment"]
    assert seen[-1]["fvu"] < 0.15
    # Labels alone say which latent it is: without them none of these is special.
    plain = train(config, batches, 100, rows=256, lr=lr, progress=False)
    assert rates(plain, CONSTRUCTION)[0] < 0.5


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_published_losses_fall_when_fine_tuning(variant):
    source = planted.source()
    batches = Batches(source, planted.SITE)
    config = SAEConfig(planted.D, 3 * planted.D, 6, update=True)
    base = train(config, batches, 200, rows=512, lr=1e-2, progress=False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    labels = Labels(*NAMES, assignment_of(base, source, planted.SITE))
    losses = []
    train(
        config,
        batches,
        100,
        objective=Ranked(reconstruction="mse", supervision=Supervision(variant, 3.0, 0.1, 0.01)),
        start=base,
        labels=labels,
        rows=512,
        lr=1e-2,
        progress=False,
        log=lambda step, values: losses.append(values["assignment"]),
    )
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_scores_find_the_latents_of_planted_concepts():
    source = planted.source()
    sae = train(
        SAEConfig(planted.D, 3 * planted.D, 6, update=True),
        Batches(source, planted.SITE),
        400,
        rows=512,
        lr=1e-2,
        progress=False,
    )
    found = assignment_of(sae, source, planted.SITE)
    table = planted.directions()
    for number, name in enumerate(planted.CONCEPT_NAMES):
        assert float(sae.W_dec[found.concepts[name]] @ table[number]) > 0.8, name
    assert set(found.styles) == set(planted.STYLE_NAMES)


def test_assignment_is_greedy_unique_and_puts_concepts_first():
    scores = torch.zeros(3, 2, 4)
    scores[0, :, 1] = 0.3
    scores[1, :, 1] = torch.tensor([0.9, 0.5])  # the higher one on average
    scores[0, :, 2] = 0.2
    scores[2, :, 1] = 0.95  # a style's, so last in spite of its score
    scores[2, :, 3] = 0.1
    found = assign(scores, ["a", "b"], ["s"])
    assert found.to_json() == {"concepts": {"a": 2, "b": 1}, "styles": {"s": 3}}
    assert found.latents == [2, 1, 3]
    ties = assign(torch.zeros(3, 1, 3), ["a", "b", "c"])
    assert ties.concepts == {"a": 0, "b": 1, "c": 2}


def test_an_assignment_file_reads_back_and_a_damaged_one_is_refused(tmp_path):
    given = Assignment({"Köter": 3}, {"Sketch": 0})
    save_assignment(given, tmp_path)
    assert load_assignment(tmp_path) == given
    path = tmp_path / "assignment.json"
    for text, message in (
        ("[]", 'expected {"concepts"'),
        ('{"concepts": {"a": 1}}', 'expected {"concepts"'),
        ('{"concepts": {"a": 1}, "styles": {"b": 1}}', "latent 1 is given more than once"),
        ('{"concepts": {"a": -1}, "styles": {}}', "expected latents as integers >= 0, got -1"),
        ('{"concepts": {"a": true}, "styles": {}}', "expected latents as integers >= 0, got True"),
        ('{"concepts": {}, "styles": {}}', "expected one or more names"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_assignment(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": None}, "a supervised objective needs them"),
        ({"objective": Ranked()}, "and no other takes them"),
        ({"batches": lambda step: torch.zeros(8, planted.D)}, "expects an object with samples"),
        (
            {"labels": Labels(*NAMES, Assignment.by_construction(*NAMES)), "config": SAEConfig(24, 5, 2)},
            r"expected latents in \[0, 5\), got 5",
        ),
    ],
    ids=["no labels", "labels unused", "no samples", "latent out of range"],
)
def test_labels_and_objective_must_fit(settings, message):
    source = planted.source(8)
    arguments = {"objective": Ranked(supervision=Supervision()), "labels": CONSTRUCTION, **settings}
    config = arguments.pop("config", SAEConfig(planted.D, 48, 4))
    batches = arguments.pop("batches", Batches(source, planted.SITE))
    with pytest.raises(ValueError, match=message):
        train(config, batches, 2, progress=False, **arguments)


def test_labels_without_latents_and_latents_without_labels_are_refused():
    with pytest.raises(ValueError, match="concept 3 is on one side only"):
        Labels(*NAMES, Assignment.by_construction(planted.CONCEPT_NAMES[:3], planted.STYLE_NAMES))
    plain = planted.source(8, labelled=False)
    assert isinstance(plain, InMemory)
    with pytest.raises(ValueError, match="these activations have none"):
        assignment_of(None, plain, planted.SITE)
