"""Statistics, scores, selection, merging and files of the concept dictionary, against their formulas."""

import json

import pytest
import safetensors.torch
import torch

from lbdt.dictionary import Calibration, ConceptDictionary, ConceptStatistics, Histograms
from lbdt.sae import SparseCode

CONCEPTS = ("Cats", "Dogs", "Trees")
TIMESTEPS = (901, 501, 1)
L, K = 40, 6


def make_codes(seed=0, batch=2, patches=9, whole=True):
    """Per (concept, bin) a random code; whole-numbered values make float32 sums exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    codes = {}
    for concept in range(len(CONCEPTS)):
        for bin in range(len(TIMESTEPS)):
            indices = torch.rand(batch, patches, L, generator=generator).topk(K).indices
            values = torch.rand(batch, patches, K, generator=generator) * 8
            codes[concept, bin] = SparseCode(values.floor() if whole else values, indices)
    return codes


def dense(code):
    return torch.zeros(*code.values.shape[:-1], L).scatter(-1, code.indices, code.values)


def collect(*code_sets):
    statistics = ConceptStatistics(CONCEPTS, TIMESTEPS, L)
    for codes in code_sets:
        for (concept, bin), code in codes.items():
            statistics.add(concept, bin, code)
    return statistics


def make_dictionary(**changes):
    """Random means, equal counts."""
    mean = torch.rand(3, 3, L, generator=torch.Generator().manual_seed(3))
    arguments = {"concepts": CONCEPTS, "timesteps": TIMESTEPS, "mean": mean, "counts": torch.full((3, 3), 10)}
    return ConceptDictionary(**{**arguments, **changes})


def test_means_equal_the_naive_formula():
    first, second = make_codes(0), make_codes(1, batch=3, patches=4)
    dictionary = collect(first, second).build()
    for (concept, bin), code in first.items():
        z = torch.cat([dense(code).flatten(0, 1), dense(second[concept, bin]).flatten(0, 1)])
        torch.testing.assert_close(dictionary.mean[concept, bin], z.mean(0))
        assert int(dictionary.counts[concept, bin]) == len(z) == 30
    assert dictionary.peak == 7.0
    assert dictionary.num_latents == L


def test_statistics_and_dictionaries_merge_to_one_pass():
    first, second = make_codes(0), make_codes(1, batch=6)
    whole = collect(first, second)
    merged = collect(first).merge(collect(second))
    assert torch.equal(merged.sums, whole.sums)
    assert torch.equal(merged.counts, whole.counts)
    assert merged.peak == whole.peak
    of_files = collect(first).build().merge(collect(second).build())
    torch.testing.assert_close(of_files.mean, whole.build().mean)
    assert torch.equal(of_files.counts, whole.counts)


def test_firing_is_counted_merged_saved_and_ordered_by(tmp_path):
    first, second = make_codes(0), make_codes(1, batch=3)
    z = torch.cat([dense(code).flatten(0, 1) for codes in (first, second) for code in codes.values()])
    dictionary = collect(first, second).build()
    assert torch.equal(dictionary.fired, (z > 0).sum(0))
    assert torch.equal(collect(first).merge(collect(second)).build().fired, dictionary.fired)
    assert torch.equal(collect(first).build().merge(collect(second).build()).fired, dictionary.fired)
    order = dictionary.firing_order()
    assert torch.equal(order.sort().values, torch.arange(L))
    assert (dictionary.fired[order].diff() <= 0).all()
    dictionary.save_pretrained(tmp_path, dtype=torch.float16)
    assert torch.equal(ConceptDictionary.from_pretrained(tmp_path).fired, dictionary.fired)
    calibrated = Calibration(dictionary, candidates=2)
    assert torch.equal(calibrated.build().fired, dictionary.fired)
    assert torch.equal(dictionary.without_histograms().fired, dictionary.fired)


def test_without_firing_counts_the_means_order_the_latents(tmp_path):
    dictionary = make_dictionary()
    assert dictionary.fired is None
    assert (dictionary.mean.sum((0, 1))[dictionary.firing_order()].diff() <= 0).all()
    assert make_dictionary(fired=torch.ones(L)).merge(dictionary).fired is None
    dictionary.save_pretrained(tmp_path)
    info = json.loads((tmp_path / "dictionary.json").read_text())
    # As the first version wrote it.
    assert info.pop("fired") is False
    assert [info.pop(name) for name in ("assigned", "gate", "site")] == [None] * 3
    assert info["version"] == 7
    info["version"] = 1
    (tmp_path / "dictionary.json").write_text(json.dumps(info))
    assert ConceptDictionary.from_pretrained(tmp_path).fired is None


def test_dictionaries_of_other_concepts_merge_to_their_union():
    mean = torch.rand(1, 3, L)
    birds = ConceptDictionary(("Birds",), TIMESTEPS, mean, torch.full((1, 3), 5), bank=torch.ones(3, 2, 4))
    merged = make_dictionary().merge(birds)
    assert merged.concepts == (*CONCEPTS, "Birds")
    torch.testing.assert_close(merged.mean[3], mean[0])
    torch.testing.assert_close(merged.mean[:3], make_dictionary().mean)
    assert merged.bank.shape == (3, 2, 4)


def test_scores_equal_the_formula():
    codes = make_codes()
    codes[1, 0] = SparseCode(*(part[:1] for part in codes[1, 0]))  # o weighs patches, not concepts
    scores = collect(codes).build().scores()
    for concept in range(3):
        for bin in range(3):
            a = dense(codes[concept, bin]).flatten(0, 1).mean(0)
            others = [dense(codes[c, bin]).flatten(0, 1) for c in range(3) if c != concept]
            o = torch.cat(others).mean(0)
            expected = a / (a.sum() + 1e-8) - o / (o.sum() + 1e-8)
            torch.testing.assert_close(scores[concept, bin], expected)


def test_scores_of_a_single_concept_have_nothing_to_subtract():
    mean = torch.rand(1, 3, L)
    dictionary = ConceptDictionary(("Cats",), TIMESTEPS, mean, torch.ones(1, 3))
    torch.testing.assert_close(dictionary.scores(), mean / mean.sum(-1, keepdim=True))


@pytest.mark.parametrize("percentile", [0, 50, 95, 97.5, 99.99])
def test_percentile_selection(percentile):
    dictionary = make_dictionary()
    selection = dictionary.select("Dogs", percentile=percentile)
    scores = dictionary.scores()[1]
    limit = torch.quantile(scores.double(), percentile / 100, dim=-1, keepdim=True)
    chosen = (scores > limit) & (scores > 0)
    assert selection.latents.tolist() == chosen.any(0).nonzero().flatten().tolist()
    published = dictionary.mean.mean(0)[:, selection.latents]
    assert torch.equal(selection.thresholds, published.where(chosen[:, selection.latents], torch.inf))
    assert (selection.concept, selection.kind) == ("Dogs", "published")
    assert selection.thresholds.dtype == torch.float32
    assert selection.latents.dtype == torch.int64


@pytest.mark.parametrize("top_k", [1, 3, L], ids=["one", "three", "more than score > 0"])
def test_top_k_selection(top_k):
    dictionary = make_dictionary()
    selection = dictionary.select("Trees", top_k=top_k)
    scores = dictionary.scores()[2]
    for bin in range(3):
        best = [i for i in scores[bin].argsort(descending=True)[:top_k].tolist() if scores[bin, i] > 0]
        taken = selection.latents[torch.isfinite(selection.thresholds[bin])]
        assert taken.tolist() == sorted(best)
    default = dictionary.select("Trees")
    assert torch.isfinite(default.thresholds).sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("calibrate", [False, True], ids=["uncalibrated", "calibrated"])
def test_file_round_trip(tmp_path, dtype, calibrate):
    codes = make_codes(whole=False)
    dictionary = collect(codes).build()
    dictionary.bank = torch.randn(3, 2, 5)
    if calibrate:
        calibration = Calibration(dictionary, candidates=4, bins=16)
        for (concept, bin), code in codes.items():
            calibration.add(concept, bin, code)
        dictionary = calibration.build()
    dictionary.save_pretrained(tmp_path, dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dictionary.json", "dictionary.safetensors"]
    back = ConceptDictionary.from_pretrained(tmp_path)
    stored = dtype or torch.float32
    assert back.concepts == CONCEPTS
    assert back.timesteps.tolist() == list(TIMESTEPS)
    assert back.peak == dictionary.peak
    assert torch.equal(back.mean, dictionary.mean.to(stored).float())
    assert torch.equal(back.bank, dictionary.bank.to(stored).float())
    assert torch.equal(back.counts, dictionary.counts)
    assert (back.histograms is not None) == calibrate
    if calibrate:
        for name in ("candidates", "on", "off", "edges"):
            got, expected = getattr(back.histograms, name), getattr(dictionary.histograms, name)
            assert torch.equal(got, expected), name
            assert got.dtype == expected.dtype
        assert back.select("Cats", top_k=1).kind == "calibrated"


def test_bins_are_found_by_timestep_value():
    dictionary = make_dictionary()
    asked = torch.tensor([999.0, 901.0, 701.5, 701.0, 700.9, 251.0, 250.9, 0.0])
    assert dictionary.nearest_bin(asked).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert dictionary.nearest_bin(asked.long().view(2, 4)).shape == (2, 4)
    assert dictionary.nearest_bin(torch.tensor(501)).item() == 1


def test_unknown_concepts_name_the_known_and_the_nearest():
    with pytest.raises(ValueError, match="unknown concept 'cat'.*mean 'Cats'.*Cats, Dogs, Trees"):
        make_dictionary().select("cat")
    with pytest.raises(
        ValueError, match="unknown concept 'Xylophone'; *Known|'Xylophone' Known concepts: Cats"
    ):
        make_dictionary().select("Xylophone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": 99.0, "top_k": 1}, "percentile or top_k, not both"),
        ({"percentile": 100}, r"percentile: expected a number in \[0, 100\)"),
        ({"percentile": float("nan")}, "percentile: expected a number"),
        ({"top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"top_k": 1.5}, "top_k: expected an integer >= 1, got 1.5"),
        ({"thresholds": "best"}, "expected 'published' or 'calibrated', got 'best'"),
        ({"thresholds": "calibrated"}, "need histograms, which this dictionary lacks"),
    ],
    ids=str,
)
def test_bad_selections(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dictionary().select("Cats", **arguments)


def test_a_selection_without_latents_is_an_error():
    same = make_dictionary(mean=torch.ones(3, 3, L))
    with pytest.raises(ValueError, match="no latent of 'Cats' passes the criterion"):
        same.select("Cats", top_k=1)


def test_places_without_patches_are_named():
    codes = make_codes()
    del codes[1, 2]
    dictionary = collect(codes).build()
    with pytest.raises(ValueError, match="no patches of 'Dogs' at timestep 1 "):
        dictionary.select("Cats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": ("Cats", "Cats", "Dogs")}, "expected distinct names, got Cats"),
        ({"concepts": ()}, "one or more non-empty names"),
        ({"timesteps": (1, 501, 901)}, "strictly descending values"),
        ({"timesteps": (900.5, 500, 1)}, "expected whole numbers"),
        ({"mean": torch.zeros(3, 2, L)}, r"mean: expected shape \[3, 3, any\], got \[3, 2, 40\]"),
        ({"mean": torch.full((3, 3, L), torch.nan)}, "mean: expected finite values >= 0"),
        ({"mean": torch.full((3, 3, L), -1.0)}, "mean: expected finite values >= 0"),
        ({"counts": torch.zeros(3)}, r"counts: expected shape \[3, 3\]"),
        ({"bank": torch.zeros(2, 4, 5)}, r"bank: expected shape \[3, any, any\]"),
        ({"bank": torch.full((3, 4, 5), torch.inf)}, "bank: expected finite values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_dictionaries(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dictionary(**changes)


def test_bad_histograms():
    counts = torch.zeros(3, 3, 2, 4, dtype=torch.int64)
    edges = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match=r"candidates: expected latents in \[0, 40\), got 40"):
        make_dictionary(histograms=Histograms(torch.full((3, 3, 2), L), counts, counts, edges))
    with pytest.raises(ValueError, match=r"on: expected shape \[3, 3, 2, 3\]"):
        make_dictionary(histograms=Histograms(torch.zeros(3, 3, 2), counts, counts, edges[:-1]))
    with pytest.raises(ValueError, match="edges: expected"):
        make_dictionary(histograms=Histograms(torch.zeros(3, 3, 2), counts, counts, edges.flip(0)))


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        ((3, 0), (torch.ones(1, 1, 1), torch.zeros(1, 1, 1)), r"expected concept in \[0, 3\)"),
        ((0, -1), (torch.ones(1, 1, 1), torch.zeros(1, 1, 1)), r"bin in \[0, 3\), got 0 and -1"),
        ((0, 0), (torch.ones(1, 1, 1), torch.full((1, 1, 1), L)), r"expected indices in \[0, 40\), got 40"),
        (
            (0, 0),
            (torch.full((1, 1, 1), torch.nan), torch.zeros(1, 1, 1)),
            "expected finite activations >= 0",
        ),
        ((0, 0), (-torch.ones(1, 1, 1), torch.zeros(1, 1, 1)), "expected finite activations >= 0"),
        ((0, 0), (torch.ones(1, 1, 2), torch.zeros(1, 1, 1)), "values and indices of one shape"),
    ],
    ids=["concept", "bin", "index", "nan", "negative", "shapes"],
)
def test_bad_codes(place, code, message):
    statistics = ConceptStatistics(CONCEPTS, TIMESTEPS, L)
    with pytest.raises(ValueError, match=message):
        statistics.add(*place, SparseCode(*code))
    assert not statistics.counts.any()


def test_merging_what_does_not_fit():
    statistics = ConceptStatistics(CONCEPTS, TIMESTEPS, L)
    with pytest.raises(ValueError, match="concepts .* differ"):
        statistics.merge(ConceptStatistics(("Cats",), TIMESTEPS, L))
    with pytest.raises(ValueError, match="timesteps .* differ"):
        statistics.merge(ConceptStatistics(CONCEPTS, (900, 500, 1), L))
    with pytest.raises(ValueError, match="40 and 41 latents"):
        statistics.merge(ConceptStatistics(CONCEPTS, TIMESTEPS, L + 1))


def rewritten(folder, **tensors):
    make_dictionary().save_pretrained(folder)
    path = folder / "dictionary.safetensors"
    state = {**safetensors.torch.load_file(path), **tensors}
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": None}, "missing tensor mean; expected mean, counts"),
        ({"mean": torch.zeros(3, 3, 5)}, r"tensor mean: expected shape \[3, 3, 40\], got \[3, 3, 5\]"),
        ({"mean": torch.full((3, 3, L), torch.nan)}, "tensor mean: expected finite values, got 360 NaN"),
        ({"mean": torch.full((3, 3, L), -1.0)}, "not a valid dictionary: mean: expected finite values >= 0"),
        ({"edges": torch.zeros(3)}, "unknown tensor edges"),
    ],
    ids=["missing", "shape", "nan", "negative", "unknown"],
)
def test_wrong_files(tmp_path, tensors, message):
    rewritten(tmp_path, **tensors)
    with pytest.raises(ValueError, match=message):
        ConceptDictionary.from_pretrained(tmp_path)


def test_damaged_files(tmp_path):
    make_dictionary().save_pretrained(tmp_path)
    info = json.loads((tmp_path / "dictionary.json").read_text())
    for change, message in (
        ({"version": 8}, "expected version 1 to 7, got 8"),
        ({"version": 1}, "missing or unknown: assigned, fired, gate, site"),
        ({"colour": "red"}, "missing or unknown: colour"),
        ({"peak": "high"}, "peak: expected a finite number"),
        ({"concepts": ["Cats", "Cats", "Dogs"]}, "expected distinct names"),
    ):
        (tmp_path / "dictionary.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(ValueError, match=message):
            ConceptDictionary.from_pretrained(tmp_path)
    (tmp_path / "dictionary.json").write_text(json.dumps(info))
    path = tmp_path / "dictionary.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"dictionary\.safetensors: not a readable safetensors file"):
        ConceptDictionary.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"dictionary\.safetensors: no such file"):
        ConceptDictionary.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder, and not a Hugging Face repository id"):
        ConceptDictionary.from_pretrained(tmp_path / "nowhere")


def test_float16_overflow_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="tensor mean: values up to 1e.05 overflow torch.float16"):
        make_dictionary(mean=torch.full((3, 3, L), 1e5)).save_pretrained(tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
