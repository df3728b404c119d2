"""Detection rates on held-out activations, by hand and against the dense computation."""

import pytest
import torch

from lbdt.activations import InMemory
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.scoring import score
from lbdt.dictionary.selectivity import selectivity
from tests.dictionary.activations import CONCEPTS, SITE, STYLES, TIMESTEPS, dense, in_memory, made, make_sae


def by_hand_dictionary():
    """Latent 0 detects Cats above 1, latent 1 Dogs above 2 (the published threshold is the mean over concepts)."""
    mean = torch.zeros(2, 1, 24)
    mean[0, 0, 0], mean[1, 0, 1] = 2.0, 4.0
    return ConceptDictionary(("Cats", "Dogs"), (500,), mean, torch.ones(2, 1))


def test_rates_by_hand():
    x = torch.zeros(3, 1, 4, 8)
    x[0, 0, :3, 0] = 1.5  # a cat, detected in 3 of 4 patches
    x[0, 0, 0, 1] = 2.5  # and as a dog in 1
    x[1, 0, :2, 1] = 3.0  # a dog, detected in 2
    x[2] = 9  # without a label: left out
    source = InMemory(
        x,
        site=SITE,
        timesteps=(510,),
        concepts=("Cats", "Dogs"),
        concept=torch.tensor([0, 1, -1]),
        prompts_per_shard=2,
    )
    rates = selectivity(source, SITE, make_sae("relu"), by_hand_dictionary(), top_k=1)
    # Cats: 3/4 on, 0/4 off. Dogs: 2/4 on, 1/4 off.
    assert rates.tolist() == [[0.625, 0.125]]


@pytest.mark.parametrize("by", ["concepts", "styles"])
def test_rates_equal_the_dense_computation(by):
    sae = make_sae()
    dictionary = score(in_memory(), SITE, sae, by=by, progress=False)
    held = in_memory(15, first=100)
    x, concept, style = made(100, 15)
    label, z = (concept if by == "concepts" else style), dense(sae, x)
    expected = torch.zeros(len(TIMESTEPS), 2, dtype=torch.float64)
    names = CONCEPTS if by == "concepts" else STYLES
    for place, name in enumerate(names):
        selection = dictionary.select(name, top_k=1)
        found = (z[..., selection.latents] > selection.thresholds.unsqueeze(1)).any(-1).double()
        expected[:, 0] += found[label == place].mean((0, 2)) / len(names)
        expected[:, 1] += found[(label >= 0) & (label != place)].mean((0, 2)) / len(names)
    torch.testing.assert_close(selectivity(held, SITE, sae, dictionary, by=by, top_k=1), expected)
    if by == "concepts":
        assert (expected[:, 0] > expected[:, 1] + 0.3).all()


def test_refusals():
    dictionary, sae = by_hand_dictionary(), make_sae()
    with pytest.raises(ValueError, match="made with an SAE of 24 latents, but the given SAE has 30"):
        selectivity(in_memory(), SITE, make_sae(latents=30), dictionary)
    with pytest.raises(ValueError, match="styles Sketch, Crayon are none of the dictionary's Cats, Dogs"):
        selectivity(in_memory(), SITE, sae, dictionary, by="styles")
    with pytest.raises(ValueError, match="no images of Cats, Dogs, or none of others"):
        selectivity(in_memory(1, first=102), SITE, sae, dictionary, top_k=1)
