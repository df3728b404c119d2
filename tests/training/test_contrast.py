"""The contrast of SAEParate: its loss by hand, its gradient by autograd, the images that it is given."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lbdt.activations.batches import Batches, Stream, paired
from lbdt.sae import SAEConfig
from lbdt.training import Assignment, Contrast, Labels, Ranked, Supervision, train
from lbdt.training.recipe_training import RecipeOptions, train_recipe
from lbdt.training.recipes import RECIPES
from lbdt.training.supervision import BatchLabels
from tests.training import planted
from tests.training.test_objectives import IMAGES, LATENTS, PATCHES, autoencoder, data, dense_code
from tests.training.test_objectives import compare as compare_gradients

CONCEPTS = torch.tensor([0, 1, 0, 2, 1, 0, -1, -1])
STYLES = torch.tensor([0, 0, 1, 1, 0, 0, 0, -1])


def labels() -> BatchLabels:
    return BatchLabels(
        torch.zeros(0, dtype=torch.int64), 0, torch.zeros(IMAGES, 0), PATCHES, CONCEPTS, STYLES
    )


def literal(images, contrast) -> torch.Tensor:
    """Image by image, as METHOD.md, 6.8 has it."""
    unit = images / images.norm(dim=1, keepdim=True)
    losses = []
    for i in range(len(images)):
        kinds = {"concepts": [CONCEPTS], "styles": [STYLES], "both": [CONCEPTS, STYLES]}[contrast.by]

        def shared(j, i=i, kinds=kinds):
            known = all(int(kind[i]) >= 0 and int(kind[j]) >= 0 for kind in kinds)
            return sum(bool(kind[i] == kind[j]) for kind in kinds) if known else 0

        others = [j for j in range(len(images)) if j != i]
        like = [j for j in others if shared(j) == len(kinds)]
        weight = {j: contrast.hard if len(kinds) == 2 and shared(j) == 1 else 1.0 for j in others}
        if not like:
            continue
        score = {j: weight[j] * torch.exp(unit[i] @ unit[j] / contrast.temperature) for j in others}
        losses.append(-sum(torch.log(score[j] / sum(score.values())) for j in like) / len(like))
    return torch.stack(losses).mean()


ROWS = [
    pytest.param(Contrast(), 3 + 2, id="concepts"),
    pytest.param(Contrast("styles", temperature=0.5), 7, id="styles"),
    pytest.param(Contrast("both", weight=1.0, hard=4.0), 4, id="both"),
]


@pytest.mark.parametrize(("contrast", "anchors"), ROWS)
def test_the_loss_is_the_formula(contrast, anchors):
    images = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(contrast.loss(images, CONCEPTS, STYLES), literal(images, contrast))


def test_the_loss_by_hand():
    """Two images alike of one label, at a right angle to one of another."""
    images = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    got = Contrast(temperature=0.5).loss(images, torch.tensor([4, 4, 7]), torch.full((3,), -1))
    assert float(got) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize(
    "concepts", [[0, 1, 2], [-1, -1, -1], [0, -1, -1]], ids=["all differ", "none", "one"]
)
def test_without_a_pair_there_is_no_loss(concepts):
    images = torch.randn(3, 4, requires_grad=True)
    loss = Contrast().loss(images, torch.tensor(concepts), torch.full((3,), -1))
    loss.backward()
    assert float(loss.detach()) == 0 and not images.grad.any()


def test_silent_images_give_no_gradient_and_no_nan():
    images = torch.zeros(4, 3, requires_grad=True)
    loss = Contrast().loss(images.relu(), torch.tensor([0, 0, 1, 1]), torch.full((4,), -1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(3)) and not images.grad.any()


@pytest.mark.parametrize("pre", [False, True], ids=["affine", "pre-encoder"])
@pytest.mark.parametrize("pool", [1.0, 0.5, 0.0], ids=["mean", "half", "largest"])
@pytest.mark.parametrize(("contrast", "anchors"), ROWS)
def test_its_gradient_is_autograds(monkeypatch, contrast, anchors, pool, pre):
    contrast = replace(contrast, pool=pool)
    monkeypatch.setattr("tests.training.test_objectives.labelled", labels)
    sae, x = autoencoder(pre_encoder=pre), data()
    h, z = dense_code(sae, x)
    fvu = (z @ sae.W_dec + sae.b_dec - x).square().sum() / (x - x.mean(0)).square().sum()
    images = h.relu().view(IMAGES, PATCHES, LATENTS)
    loss = literal(images.topk(max(1, math.ceil(pool * PATCHES)), dim=1).values.mean(1), contrast)
    objective = Ranked(auxk_alpha=0.0, supervision=contrast)
    compare_gradients(sae, objective, {"fvu": fvu, "contrast": loss}, fvu + contrast.weight * loss)


@pytest.mark.parametrize("by", ["concepts", "styles", "both"])
@pytest.mark.parametrize("timesteps", [1, 2, 3])
def test_pairs_are_of_one_label_and_every_map_comes_once(by, timesteps):
    pairs = paired(CONCEPTS, STYLES, timesteps, by)
    prompt, timestep = pairs // timesteps, pairs % timesteps
    known = (CONCEPTS >= 0) & (STYLES >= 0)
    key = {"concepts": CONCEPTS, "styles": STYLES, "both": (CONCEPTS * 9 + STYLES).where(known, -1)}[by]
    assert (key[prompt[:, 0]] == key[prompt[:, 1]]).all()
    assert pairs.flatten().unique().numel() == pairs.numel()
    for label in key.unique().tolist():
        maps = int((key == label).sum()) * timesteps
        assert int((key[prompt[:, 0]] == label).sum()) == maps // 2
    apart = (timestep[:, 0] - timestep[:, 1]).abs()
    assert (apart <= 1).all() and ((prompt[:, 0] != prompt[:, 1]) | (apart == 1)).all()


def batches_of(kind, source, seed=0):
    if kind == "cache":
        return Batches(source, planted.SITE, seed)
    return Stream(source, planted.SITE, seed, window=3, steps_per_shard=2)


@pytest.mark.parametrize("kind", ["cache", "stream"])
@pytest.mark.parametrize("pairs", ["concepts", "styles", "both"])
def test_batches_hold_images_of_a_label_in_twos(kind, pairs):
    source = planted.source(48)
    for step in (0, 1, 5, 40):
        x, concepts, styles = batches_of(kind, source).samples(step, 11, pairs=pairs)
        assert x.shape == (10, planted.PATCHES, planted.D)
        for labels_of, wanted in ((concepts, pairs != "styles"), (styles, pairs != "concepts")):
            assert not wanted or (labels_of[0::2] == labels_of[1::2]).all()
        # A function of the step: another one, asked for nothing before, gives the same.
        again = batches_of(kind, source).samples(step, 11, pairs=pairs)
        assert all(map(torch.equal, again, (x, concepts, styles)))
        assert not torch.equal(batches_of(kind, source, 1).samples(step, 11, pairs=pairs).x, x)
        assert (x[0::2] != x[1::2]).flatten(1).any(1).all()


def test_every_pair_comes_once_an_epoch():
    source = planted.source(48)
    batches = Batches(source, planted.SITE)
    seen = torch.cat([batches.samples(step, 12, pairs="concepts").x for step in range(8)])
    assert seen.flatten(1).unique(dim=0).shape[0] == 96 == source.prompts * 2


@pytest.mark.parametrize("kind", ["cache", "stream"])
def test_labels_that_come_once_are_refused(kind):
    source = planted.source(2, timesteps=1)
    with pytest.raises(ValueError, match="no two maps have the same label"):
        batches_of(kind, source).samples(0, 4, pairs="concepts")


def test_images_of_a_concept_are_drawn_together():
    """On planted concepts: the pooled latents of held-out images are nearer within a concept than without the loss."""
    source, held = planted.source(), planted.source(48, seed=9, timesteps=1)
    held.prompts_per_shard = 48
    config = SAEConfig(planted.D, 2 * planted.D, 6, update=True, pre_encoder=True)
    number = torch.arange(48) % planted.CONCEPTS
    seen, margins = [], []
    for weight in (0.0, 0.1):
        sae = train(
            config,
            Batches(source, planted.SITE),
            150,
            objective=Ranked(supervision=Contrast(weight=weight)),
            labels=Labels(planted.CONCEPT_NAMES, planted.STYLE_NAMES, None),
            rows=256,
            lr=1e-2,
            progress=False,
            log=lambda step, values: seen.append(values["contrast"]),
        )
        h = sae.pre_activations(held.shard(0, planted.SITE).x[:, 0]).relu()
        unit = F.normalize(h.topk(planted.OBJECT_PATCHES, dim=1).values.mean(1), dim=1)
        same = number.unsqueeze(0) == number.unsqueeze(1)
        same_image = torch.eye(48, dtype=torch.bool)
        cosine = unit @ unit.T
        margins.append(float(cosine[same & ~same_image].mean() - cosine[~same].mean()))
    assert margins[1] > margins[0] + 0.1
    assert seen[-1] < 0.5 * seen[150]


def test_the_recipe_is_the_published_one():
    recipe = RECIPES["saeparate"]
    config = recipe.config(8, update=False)
    assert (config.pre_encoder, config.batch_topk, config.k, config.num_latents) == (True, True, 32, 128)
    assert recipe.objective().supervision == Contrast("concepts", weight=0.1, temperature=0.07)
    joint = recipe.objective("joint", temperature=0.1).supervision
    assert (joint.by, joint.weight, joint.hard, joint.temperature) == ("both", 1.0, 4.0, 0.1)


def test_the_joint_variant_keeps_64_latents(tmp_path):
    options = RecipeOptions(variant="joint", steps=1, rows=64, expansion=4)
    report = train_recipe(
        RECIPES["saeparate"],
        planted.source(48),
        planted.SITE,
        tmp_path,
        options=options,
        progress=False,
    )
    assert report["k"] == 64 and not (tmp_path / "assignment.json").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Contrast("objects"), "by: expected one of concepts, styles, both; got 'objects'"),
        (lambda: Contrast(weight=-1.0), "weight: expected a finite number >= 0"),
        (lambda: Contrast(temperature=0.0), "temperature: expected a finite number > 0"),
        (lambda: Contrast(hard=math.inf), "hard: expected a finite number > 0"),
        (lambda: Contrast(pool=2.0), r"pool: expected a share in \[0, 1\]"),
    ],
    ids=["by", "weight", "temperature", "hard", "pool"],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("supervision", "names", "assigned", "message"),
    [
        (
            Contrast(),
            (planted.CONCEPT_NAMES, ()),
            True,
            "but for a contrast, which assigns none; got latents",
        ),
        (Supervision(), (planted.CONCEPT_NAMES, ()), False, "expected a latent for each name.*got none"),
        (Contrast("both"), (planted.CONCEPT_NAMES, ()), False, "by concepts, styles needs styles, got none"),
    ],
    ids=["assigned", "not assigned", "no styles"],
)
def test_labels_that_do_not_fit_are_refused(supervision, names, assigned, message):
    given = Labels(*names, Assignment.by_construction(*names) if assigned else None)
    with pytest.raises(ValueError, match=message):
        train(
            SAEConfig(planted.D, planted.D, 4),
            Batches(planted.source(16), planted.SITE),
            1,
            objective=Ranked(supervision=supervision),
            labels=given,
            progress=False,
        )


def test_latents_are_not_assigned(tmp_path):
    given = Assignment.by_construction(planted.CONCEPT_NAMES, planted.STYLE_NAMES)
    with pytest.raises(ValueError, match="recipe saeparate compares labels and assigns no latents"):
        train_recipe(
            RECIPES["saeparate"], planted.source(16), planted.SITE, tmp_path / "out", assignment=given
        )
