"""Batches are pure in their step, and every row is seen once an epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbdt.activations import InMemory, Prompt, Site, Source
from lbdt.activations.batches import Batches, Stream
from lbdt.activations.generated import Generated
from lbdt.activations.shuffle import mix, permute
from tests import toy
from tests.repeats import matches, repeats

SITE = Site("unet.mid_block.attentions.0")
PROMPTS, STEPS, PATCHES, WIDTH = 7, 3, 4, 2
ROWS = PROMPTS * STEPS * PATCHES
CONCEPTS = torch.tensor([0, 1, 0, -1, 1, 0, 1])
STYLES = torch.tensor([-1, 0, 0, 0, -1, 0, 0])


@pytest.fixture
def source():
    """The first number of every row is the row's own."""
    x = torch.arange(float(ROWS)).view(PROMPTS, STEPS, PATCHES, 1).expand(-1, -1, -1, WIDTH)
    names = {"concepts": ("a", "b"), "concept": CONCEPTS, "styles": ("s",), "style": STYLES}
    return InMemory(x.contiguous(), site=SITE, timesteps=(3, 2, 1), prompts_per_shard=2, **names)


class Reread:
    """A source that counts how often its shards are made."""

    def __init__(self, source):
        self.source, self.made = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    gather, labels = Source.gather, Source.labels

    def shard(self, index, site):
        self.made.append(index)
        return self.source.shard(index, site)


def numbers(x):
    return x[..., 0].long()


@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_a_permutation_of_any_size_and_key(size, key):
    out = permute(torch.arange(size), size, key)
    assert torch.equal(out.sort().values, torch.arange(size))


def test_permutations_scatter_and_differ_by_key():
    size = 100_003
    first, second = (permute(torch.arange(size), size, key) for key in (1, 2))
    assert abs(float(torch.corrcoef(torch.stack([first, torch.arange(size)]).double())[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])) < 0.02
    assert int((first == second).sum()) < 20
    keys = torch.tensor([1, 2]).repeat(5)
    mixed = permute(torch.arange(10), size, keys)
    assert torch.equal(mixed[::2], first[:10:2]) and torch.equal(mixed[1::2], second[1:10:2])


def test_permutations_of_more_rows_than_fit_in_memory():
    size = 3 * 10**9
    places = torch.arange(size - 5000, size)
    out = permute(places, size, 7)
    assert int(out.min()) >= 0 and int(out.max()) < size and len(out.unique()) == 5000
    assert abs(float(out.double().mean()) / size - 0.5) < 0.03


def test_hashes_depend_on_every_value_and_its_place():
    found = {int(mix(*v)) for v in ((1, 2), (2, 1), (1, 3), (1,), (1 << 32,), (0,), (1, 2, 0))}
    assert len(found) == 7 and all(0 <= h < 1 << 32 for h in found)


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["loaded", "read-as-asked"])
def test_every_row_and_map_comes_once_an_epoch(source, memory):
    batches = Batches(source, SITE, seed=1, memory=memory)
    epochs = torch.cat([numbers(batches.rows(step, 12)) for step in range(14)]).view(2, ROWS)
    assert torch.equal(epochs.sort(1).values, torch.arange(ROWS).expand(2, -1))
    assert not torch.equal(epochs[0], epochs[1])
    maps = torch.cat([numbers(batches.samples(step, 3).x) for step in range(7)])
    assert torch.equal(maps.sort(0).values, torch.arange(ROWS).view(-1, PATCHES))


def test_batches_do_not_depend_on_how_they_are_read(source):
    loaded, read = Batches(source, SITE), Batches(source, SITE, memory=0)
    for step in (0, 3, 100):
        assert torch.equal(loaded.rows(step, 50), read.rows(step, 50))
        for a, b in zip(loaded.samples(step, 9), read.samples(step, 9), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(loaded.rows(0, 50), Batches(source, SITE, seed=1).rows(0, 50))
    with pytest.raises(ValueError, match="expected a step >= 0"):
        loaded.rows(-1, 5)


def test_samples_carry_their_prompts_labels(source):
    for batches in (Batches(source, SITE), Stream(source, SITE, window=2)):
        x, concepts, styles = batches.samples(1, 6)
        assert x.shape == (6, PATCHES, WIDTH)
        prompts = numbers(x)[:, 0] // (STEPS * PATCHES)
        assert torch.equal(concepts, CONCEPTS[prompts]) and torch.equal(styles, STYLES[prompts])


def test_a_stream_holds_a_window_and_makes_every_shard_once_an_epoch(source):
    counted = Reread(source)
    stream = Stream(counted, SITE, seed=2, window=2, steps_per_shard=3)
    for step in range(12):
        seen = numbers(stream.rows(step, 12))  # three times 12 are all rows of the smallest window
        assert len(stream._held) == 2 and len(seen.unique()) == len(seen)
        shards = [int(index) for index in (seen // (2 * STEPS * PATCHES)).unique()]
        assert len(shards) <= 2 and set(shards) <= set(counted.made[-2:])
    assert len(counted.made) == 5 and sorted(counted.made[:4]) == [0, 1, 2, 3]


def test_rows_of_a_stream_repeat_only_after_the_whole_window(source):
    stream = Stream(source, SITE, window=4, steps_per_shard=7)
    seen = torch.cat([numbers(stream.rows(step, 12)) for step in range(7)])
    assert torch.equal(seen.sort().values, torch.arange(ROWS))


def test_a_resumed_stream_sees_the_same_batches(pipe):
    prompts = [Prompt("a cat", "Cats", seed=i) for i in range(6)]
    site = Site(toy.HOOKPOINT)

    def stream():
        source = Generated(pipe, prompts, [site], steps=2, guidance=4.0, prompts_per_shard=2)
        return Stream(source, site, window=2, steps_per_shard=2)

    unbroken, resumed = stream(), stream()
    batches = [(unbroken.rows(step, 9), unbroken.samples(step, 3)) for step in range(9)]
    for step in (5, 8):
        assert repeats(resumed.rows(step, 9), batches[step][0])
        for a, b in zip(resumed.samples(step, 3), batches[step][1], strict=True):
            assert repeats(a, b)
    assert batches[0][0].dtype == torch.float16


def test_a_source_that_is_made_on_demand_can_be_loaded_whole(pipe):
    site = Site(toy.HOOKPOINT)
    source = Generated(
        pipe, [Prompt("a cat", "Cats", seed=i) for i in range(3)], [site], steps=2, prompts_per_shard=2
    )
    batches = Batches(source, site)
    rows = torch.cat([source.shard(i, site).x.flatten(0, 2) for i in range(2)])
    got = batches.rows(0, batches.total)
    sums = [x.double().sum(1).sort().values for x in (got, rows)]
    assert matches(*sums).all()
    assert batches.labels[0].tolist() == [0, 0, 0]
