"""`score` against the naive dense computation, and over parts, threads and batches."""

import subprocess
import sys
import threading

import pytest
import torch

from lbdt.activations import InMemory, Site
from lbdt.dictionary import ConceptDictionary, ConceptStatistics
from lbdt.dictionary.encoding import Encoder
from lbdt.dictionary.score_passes import EMPTY, Bank, priorities
from lbdt.dictionary.scoring import score
from lbdt.sae import SparseCode
from tests.dictionary.activations import (
    CONCEPTS,
    SITE,
    STYLES,
    TIMESTEPS,
    WIDTH,
    Lazy,
    dense,
    in_memory,
    made,
    make_sae,
)
from tests.repeats import repeats

UPDATE = Site(SITE.hookpoint, "update")


def run(source=None, sae=None, **options):
    return score(source or in_memory(), SITE, sae or make_sae(), progress=False, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("by", "activation"),
    [("concepts", "topk"), ("styles", "topk"), ("concepts", "topk_sigmoid"), ("concepts", "relu")],
)
def test_means_and_histograms_equal_the_naive_ones(by, activation):
    sae = make_sae(activation)
    dictionary = run(sae=sae, by=by, candidates=3)
    x, concept, style = made(0, 20)
    label, z = (concept if by == "concepts" else style), dense(sae, x)
    h = dictionary.histograms
    assert dictionary.concepts == (CONCEPTS if by == "concepts" else STYLES)
    assert torch.equal(h.candidates, dictionary.scores().topk(3).indices)
    for place in range(len(dictionary.concepts)):
        for bin in range(len(TIMESTEPS)):
            own = z[label == place][:, bin].flatten(0, 1)
            rest = z[(label >= 0) & (label != place)][:, bin].flatten(0, 1)
            torch.testing.assert_close(dictionary.mean[place, bin], own.double().mean(0).float())
            assert int(dictionary.counts[place, bin]) == len(own)
            for slot, latent in enumerate(h.candidates[place, bin].tolist()):
                assert repeats(h.on[place, bin, slot], counted(own[:, latent], h.edges))
                assert repeats(h.off[place, bin, slot], counted(rest[:, latent], h.edges))
    assert torch.equal(dictionary.fired, (z[label >= 0] > 0).sum((0, 1, 2)))
    assert repeats(dictionary.peak, float(z[label >= 0].max()))


def counted(z, edges):
    inside = [((z > low) & (z <= high)).sum() for low, high in zip(edges, edges[1:], strict=False)]
    inside[0] += (z == 0).sum()
    return torch.stack(inside)


def test_prompts_without_a_label_are_left_out():
    x, concept, style = made(0, 20)
    assert (concept < 0).any()
    loud = x.clone()
    loud[concept < 0] *= 50
    plain, changed = run(), run(in_memory(x=loud))
    assert repeats(plain.mean, changed.mean) and repeats(plain.bank, changed.bank)
    assert repeats(plain.histograms.off, changed.histograms.off) and repeats(plain.peak, changed.peak)


@pytest.mark.parametrize("processes", [2, 3, 7], ids=["2", "3", "more than shards"])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, processes):
    sae = make_sae()
    run(Lazy(20), sae, folder=tmp_path / "one")
    results = {}

    def work(process):
        part = Lazy(20)
        results[process] = run(part, sae, folder=tmp_path / "many", process=process, processes=processes)
        assert all(index % processes == process for index, _ in part.asked)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(processes))
    assert sorted(files(tmp_path / "one")) == ["dictionary.json", "dictionary.safetensors", "score.json"]
    assert repeats(files(tmp_path / "many"), files(tmp_path / "one"))
    for result in results.values():
        assert torch.equal(result.mean, results[0].mean) and torch.equal(result.bank, results[0].bank)


def test_the_order_and_size_of_batches_do_not_change_sums():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(64, 3, 4, generator=generator) * 10.0 ** torch.randint(
        -6, 3, (64, 3, 4), generator=generator
    )
    indices = torch.rand(64, 3, 9, generator=generator).topk(4).indices
    whole = ConceptStatistics(("a", "b"), (1,), 9)
    whole.add(0, 0, SparseCode(values, indices))
    parts = ConceptStatistics(("a", "b"), (1,), 9)
    for i in torch.randperm(64, generator=generator).tolist():
        parts.add(0, 0, SparseCode(values[i], indices[i]))
    assert torch.equal(whole.units, parts.units)
    exact = torch.zeros(9, dtype=torch.float64).index_add_(0, indices.flatten(), values.double().flatten())
    torch.testing.assert_close(whole.sums[0, 0].double(), exact.float().double())


def test_small_activations_keep_their_digits():
    statistics = ConceptStatistics(("a",), (1,), 1)
    value = torch.tensor([[[5.4321e-4]]])
    statistics.add(0, 0, SparseCode(value, torch.zeros(1, 1, 1, dtype=torch.int64)))
    assert abs(float(statistics.build().mean) / float(value) - 1) < 1e-6


def test_sums_that_do_not_fit_are_refused_and_not_added():
    statistics = ConceptStatistics(("a",), (1,), 1)
    zeros = torch.zeros(1, 1, 1, dtype=torch.int64)
    statistics.add(0, 0, SparseCode(torch.full((1, 1, 1), 2.0**32), zeros))
    with pytest.raises(ValueError, match="add up to more than 8.59e"):
        statistics.add(0, 0, SparseCode(torch.full((1, 1, 1), 2.0**32), zeros))
    with pytest.raises(ValueError, match="do not fit the sums"):
        statistics.add(0, 0, SparseCode(torch.full((1, 1, 1), 2.0**34), zeros))
    assert float(statistics.sums) == 2.0**32 and statistics.counts.tolist() == [[1]]


def test_codes_do_not_depend_on_the_number_of_threads():
    # Measured: of this shape 16 rows at a time round differently on 1 and 2 threads.
    sae = make_sae(latents=64, width=1280)
    x = torch.randn(4, 5, 4, 1280, generator=torch.Generator().manual_seed(0))
    before, codes = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with Encoder(sae) as encoder:
                codes.append(list(encoder.codes(x)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in codes[1:]:
        for first, second in zip(codes[0], other, strict=True):
            assert repeats(first.values, second.values) and repeats(first.indices, second.indices)


def test_the_bank_holds_undetected_patches_of_the_place_of_replacement():
    source = Lazy(20)
    dictionary = run(source, bank=5, bank_site=UPDATE, selection={"top_k": 1})
    x, concept, _ = made(0, 20)
    z = dense(make_sae(), x)
    assert dictionary.bank.shape == (len(TIMESTEPS), 5, WIDTH)
    selections = [dictionary.select(name, top_k=1) for name in CONCEPTS]
    for bin in range(len(TIMESTEPS)):
        clean = []
        for place, selection in enumerate(selections):
            mine = concept == place
            found = (z[mine, bin][..., selection.latents] > selection.thresholds[bin]).any(-1)
            clean.append((x[mine, bin] + 100)[~found].float())
        clean = torch.cat(clean)
        assert len(clean) > 5
        for row in dictionary.bank[bin]:
            assert (clean == row).all(1).any()
    assert not torch.equal(
        dictionary.bank, run(source, bank=5, bank_site=UPDATE, selection={"top_k": 1}, seed=1).bank
    )
    assert run(source, bank=0).bank is None


def test_the_bank_is_a_draw_that_merges():
    order = priorities(3, 10, 901, torch.arange(50).expand(4, 50)).flatten()
    assert order.unique().numel() == 200 and 0 <= int(order.min()) and int(order.max()) < EMPTY
    rows = torch.arange(200.0).unsqueeze(1)
    whole = Bank(1, 7, 1)
    whole.add(0, order, rows)
    parts = Bank(1, 7, 1)
    for piece in torch.randperm(200, generator=torch.Generator().manual_seed(0)).split(9):
        parts.add(0, order[piece], rows[piece])
    assert torch.equal(parts.build(), whole.build())
    assert whole.build().flatten().tolist() == order.argsort()[:7].tolist()


def test_without_undetected_patches_there_is_a_warning_and_no_bank():
    x, concept, _ = made(0, 20)
    everywhere = x.clone()
    for number in range(20):
        everywhere[number] = 0
        everywhere[number, :, :, number % 3] = 4
    with pytest.warns(UserWarning, match="no bank: at some timestep every patch is detected"):
        dictionary = run(in_memory(x=everywhere), calibrate=False, selection={"top_k": 1})
    assert dictionary.bank is None


def unlabelled():
    return InMemory(made(0, 4)[0], site=SITE, timesteps=TIMESTEPS)


def without_dogs():
    x, concept, _ = made(0, 20)
    concept[concept == 1] = 0
    return InMemory(x, site=SITE, timesteps=TIMESTEPS, concepts=CONCEPTS, concept=concept)


def damaged():
    x, *_ = made(0, 20)
    x[11, 1, 2, 3] = float("nan")
    return in_memory(x=x)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (unlabelled, {}, "the activations carry no concepts; label the prompts"),
        (without_dogs, {}, "no prompts of Dogs among the activations"),
        (damaged, {}, "expected finite values, got NaN"),
        (in_memory, {"by": "colour"}, "by: expected 'concepts' or 'styles', got 'colour'"),
        (in_memory, {"sae": make_sae(width=4)}, "activations of width 8, but the SAE was trained on 4"),
        (in_memory, {"sae": make_sae(update=True)}, "trained on the block's update; give unet.*:update"),
        (in_memory, {"bank_site": UPDATE}, "the activations hold .*:output; got .*:update"),
        (in_memory, {"candidates": 0}, r"candidates: expected an integer in \[1, 24\], got 0"),
        (in_memory, {"process": 1}, r"process: expected an integer in \[0, 0\], got 1"),
        (
            in_memory,
            {"selection": {"top": 1}},
            "selection: unknown key top; expected some of percentile, top_k",
        ),
        (in_memory, {"selection": {"top_k": 5}}, "selection: top_k 5 needs as many candidates, got 4"),
        (in_memory, {"selection": {"top_k": 1, "percentile": 99}}, "percentile or top_k, not both"),
        (in_memory, {"selection": {"false_positive": 0}}, "false_positive: expected a rate"),
        (
            in_memory,
            {"selection": {"assigned": True}},
            "needs a latent for every label; Cats, Dogs, Trees have none",
        ),
        (in_memory, {"processes": 2}, "folder: several processes need one"),
        (
            in_memory,
            {"assigned": {"Birds": 1}},
            "assigned: has none of the concepts Cats, Dogs, Trees; got Birds",
        ),
        (in_memory, {"assigned": {"Cats": 1, "Dogs": 1}}, "latent 1 belongs to both 'Cats' and 'Dogs'"),
        (in_memory, {"assigned": {"Cats": 99}}, r"expected a latent in \[0, 24\) for 'Cats', got 99"),
    ],
    ids=lambda value: (
        getattr(value, "__name__", None) or (next(iter(value), "") if isinstance(value, dict) else "")
    ),
)
def test_refusals(source, options, message):
    given = source()
    if "selection" in options or "assigned" in options:
        # Before the first pass.
        given.shard = None
    with pytest.raises(ValueError, match=message):
        run(given, **options)


def test_an_update_needs_a_place_of_replacement():
    x, concept, _ = made(0, 20)
    source = InMemory(x, site=UPDATE, timesteps=TIMESTEPS, concepts=CONCEPTS, concept=concept)
    sae = make_sae(update=True)
    with pytest.raises(
        ValueError, match="give bank_site=.*:update for an eraser of target='update', or bank=0"
    ):
        score(source, UPDATE, sae, progress=False)
    assert score(source, UPDATE, sae, bank_site=UPDATE, progress=False).bank is not None


PEAK = """
import resource, sys
import torch
from lbdt.dictionary.scoring import score
from tests.dictionary.activations import SITE, Lazy, make_sae
torch.set_num_threads(1)
source = Lazy(int(sys.argv[1]), prompts_per_shard=4, width=64, patches=1024)
score(source, SITE, make_sae(width=64), bank=8, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_prompts():
    # 96 prompts are 38 MiB in float16; a shard is 1.5 MiB.
    peaks = []
    for prompts in (24, 120):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(prompts)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12


def test_a_dictionary_of_the_same_settings_is_not_made_again(tmp_path):
    source = Lazy(20)
    first = run(source, folder=tmp_path)
    asked = len(source.asked)
    again = run(source, folder=tmp_path)
    assert len(source.asked) == asked and repeats(first.mean, again.mean)


def test_another_dictionary_in_the_folder_is_refused_and_kept(tmp_path):
    run(Lazy(20), folder=tmp_path / "mine")
    ConceptDictionary.from_pretrained(tmp_path / "mine").save_pretrained(tmp_path / "foreign")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="dictionary of other settings: candidates: 4 there, 2 here"):
        run(Lazy(20), folder=tmp_path / "mine", candidates=2)
    with pytest.raises(ValueError, match="a dictionary that this command did not make"):
        run(Lazy(20), folder=tmp_path / "foreign")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
