"""Does the attack move anything? On EmojiCanvas, with its eraser attached."""

import statistics

import pytest
import torch

from lbdt import canvas
from lbdt.attack import Prefix
from lbdt.attack.loss import ReferenceLoss, frozen, latent_of
from lbdt.attack.prefixed_text import PrefixedText

TIMESTEP = 700


@pytest.fixture(scope="module")
def pipe():
    loaded = canvas.load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def latent(pipe):
    prompt, generator = canvas.prompt("Cats", "Photo"), torch.Generator().manual_seed(1)
    return latent_of(
        pipe, pipe(prompt, num_inference_steps=10, guidance_scale=3.0, generator=generator).images[0]
    )


def replaced_update(kind):
    """An eraser that leaves the block's input: of a replaced output only the donors have a gradient, and the search
    gets nowhere along that."""
    return canvas.load_eraser(kind, target="update")


@pytest.mark.parametrize(
    ("load", "beaten"),
    [(replaced_update, statistics.median), (canvas.load_steering, min)],
    ids=["per, as half of them", "steering, as any"],
)
def test_the_loss_falls_below_that_of_drawn_prefixes(load, beaten, pipe, latent):
    text = PrefixedText(pipe, canvas.prompt("Cats", "Photo"), 5)
    loss_at = ReferenceLoss(pipe, latent)

    def loss_of(chosen: torch.Tensor) -> float:
        """Over noise that was not seen in the search."""
        with torch.no_grad():
            embedding = text.embed(chosen)
            losses = [loss_at(embedding, TIMESTEP, torch.Generator().manual_seed(900 + i)) for i in range(4)]
        return float(torch.stack(losses).mean())

    generator = torch.Generator().manual_seed(0)
    prefix = Prefix(5, len(text.vocabulary), generator)
    with load("saeuron").attach(pipe, ["Cats"]) as attached, frozen(pipe):
        drawn = [loss_of(prefix.sample().detach().argmax(1)) for _ in range(8)]
        for _ in range(40):
            prefix.step(loss_at(text.embed_soft(prefix.sample()), TIMESTEP, generator))
        found = loss_of(prefix.best())
        assert attached.report().replaced > 0
    assert found < beaten(drawn), (found, sorted(drawn))
