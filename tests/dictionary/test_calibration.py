"""Calibrated thresholds: histograms against a naive count, rates on held-out data, choice among candidates."""

import pytest
import torch

from lbdt.dictionary import Calibration, ConceptDictionary, ConceptStatistics
from lbdt.sae import SparseCode

CONCEPTS = ("Cats", "Dogs", "Trees")
TIMESTEPS = (900, 100)
L = 12


def make_codes(seed, images=8, patches=64):
    """Latent c fires on 40 % of the patches of concept c, weakly on 15 % of others'; latents 3.. are noise.

    Latent 3 + c fires more rarely, on 10 % of concept c, and never elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform():
        return torch.rand(images, patches, L, generator=generator)

    codes = {}
    for concept in range(3):
        for bin in range(2):
            z = torch.zeros(images, patches, L)
            z[..., :3] = (uniform()[..., :3] < 0.15) * uniform()[..., :3] * 0.8
            z[..., 6:] = (uniform()[..., 6:] < 0.2) * uniform()[..., 6:] * 2
            z[..., concept] = (uniform()[..., concept] < 0.4) * (0.3 + uniform()[..., concept] * 3)
            z[..., 3 + concept] = (uniform()[..., 3] < 0.1) * (0.5 + uniform()[..., 3])
            codes[concept, bin] = SparseCode(*z.topk(L))
    return codes


def dense(code):
    return torch.zeros(*code.values.shape[:-1], L).scatter(-1, code.indices, code.values)


def calibrated(*code_sets, candidates=3, bins=256):
    statistics = ConceptStatistics(CONCEPTS, TIMESTEPS, L)
    for codes in code_sets:
        for place, code in codes.items():
            statistics.add(*place, code)
    calibration = Calibration(statistics.build(), candidates, bins)
    for codes in code_sets:
        for place, code in codes.items():
            calibration.add(*place, code)
    return calibration


def test_histograms_equal_a_naive_count():
    codes = make_codes(0, images=2, patches=9)
    dictionary = calibrated(codes, candidates=3, bins=8).build()
    h = dictionary.histograms
    assert torch.equal(h.candidates, dictionary.scores().topk(3).indices)
    for concept in range(3):
        for bin in range(2):
            for slot, latent in enumerate(h.candidates[concept, bin].tolist()):
                on = dense(codes[concept, bin])[..., latent].flatten()
                others = [dense(codes[c, bin])[..., latent].flatten() for c in range(3) if c != concept]
                for counts, z in ((h.on, on), (h.off, torch.cat(others))):
                    expected = [
                        ((z > low) & (z <= high)).sum()
                        for low, high in zip(h.edges, h.edges[1:], strict=False)
                    ]
                    expected[0] += (z == 0).sum()
                    assert counts[concept, bin, slot].tolist() == [int(count) for count in expected]
                    assert int(counts[concept, bin, slot].sum()) == len(z)


@pytest.mark.parametrize("false_positive", [0.01, 0.02, 0.1, 0.5])
def test_the_rate_is_kept_on_the_calibration_set_and_nearly_on_held_out_data(false_positive):
    codes, held_out = make_codes(0, images=64), make_codes(1, images=64)
    dictionary = calibrated(codes).build()
    for concept, name in enumerate(CONCEPTS):
        selection = dictionary.select(name, percentile=92, false_positive=false_positive)
        assert selection.kind == "calibrated"
        for data, slack in ((codes, 1.0), (held_out, 1.3)):
            for bin in range(2):
                z = torch.cat([dense(data[c, bin]) for c in range(3) if c != concept])[..., selection.latents]
                off = (z > selection.thresholds[bin]).flatten(0, 1).float().mean(0)
                assert float(off.max()) <= false_positive * slack


def test_the_threshold_is_the_quantile_up_to_a_bin():
    codes = make_codes(0, images=64)
    dictionary = calibrated(codes).build()
    selection = dictionary.select("Cats", percentile=92, false_positive=0.05, allow_below_published=True)
    assert selection.latents.tolist() == [0]
    edges = dictionary.histograms.edges
    for bin in range(2):
        z = torch.cat([dense(codes[c, bin])[..., 0].flatten() for c in (1, 2)])
        quantile = torch.quantile(z, 0.95)
        threshold = selection.thresholds[bin, 0]
        assert quantile <= threshold
        assert threshold <= edges[torch.bucketize(quantile, edges, right=True)]


def test_thresholds_never_fall_below_the_published_ones_unless_asked():
    dictionary = calibrated(make_codes(0)).build()
    published = dictionary.published_thresholds()
    kept = dictionary.select("Dogs", top_k=3, false_positive=0.9)
    assert (kept.thresholds >= published[:, kept.latents]).all()
    below = dictionary.select("Dogs", top_k=3, false_positive=0.9, allow_below_published=True)
    assert (below.thresholds < published[:, below.latents]).any()


def test_of_the_candidates_those_that_detect_most_are_taken():
    dictionary = calibrated(make_codes(0)).build()
    for concept, name in enumerate(CONCEPTS):
        assert {concept, 3 + concept} <= set(dictionary.histograms.candidates[concept, 0].tolist())
        assert dictionary.select(name, top_k=1).latents.tolist() == [concept]
        assert dictionary.select(name, top_k=2).latents.tolist() == [concept, 3 + concept]
        rates = dictionary.detection_rates(dictionary.select(name, top_k=2))
        assert (rates.on[:, 0] > rates.on[:, 1]).all()


def test_detection_rates_equal_those_of_the_activations_at_edges():
    codes = make_codes(0)
    dictionary = calibrated(codes).build()
    selection = dictionary.select("Trees", top_k=2, allow_below_published=True)
    rates = dictionary.detection_rates(selection)
    for bin in range(2):
        passes = {
            c: (dense(codes[c, bin])[..., selection.latents] > selection.thresholds[bin])
            .flatten(0, 1)
            .float()
            for c in range(3)
        }
        torch.testing.assert_close(rates.on[bin], passes[2].mean(0))
        torch.testing.assert_close(rates.off[bin], torch.cat([passes[0], passes[1]]).mean(0))


def test_published_thresholds_inside_a_bin_bound_the_rates():
    codes = make_codes(0)
    dictionary = calibrated(codes, bins=32).build()
    selection = dictionary.select("Cats", top_k=1, thresholds="published")
    assert selection.kind == "published"
    rates = dictionary.detection_rates(selection)
    for bin in range(2):
        threshold = selection.thresholds[bin, 0]
        on = (dense(codes[0, bin])[..., 0] > threshold).float().mean()
        off = torch.cat([dense(codes[c, bin])[..., 0] for c in (1, 2)]).gt(threshold).float().mean()
        assert rates.on[bin, 0] <= on
        assert rates.off[bin, 0] >= off


def test_merged_parts_equal_one_pass_also_through_files(tmp_path):
    first, second = make_codes(0), make_codes(1)
    whole = calibrated(first, second)
    parts = []
    for number, codes in enumerate((first, second)):
        part = Calibration(whole.dictionary, candidates=3)
        for place, code in codes.items():
            part.add(*place, code)
        part.build().save_pretrained(tmp_path / str(number))
        parts.append(ConceptDictionary.from_pretrained(tmp_path / str(number)))
    merged = parts[0].merge(parts[1]).histograms
    for name in ("candidates", "on", "off", "edges"):
        assert torch.equal(getattr(merged, name), getattr(whole.histograms, name)), name


def test_adding_leaves_a_built_dictionary_alone():
    codes = make_codes(0)
    calibration = calibrated(codes)
    built = calibration.build()
    before = built.histograms.on.clone()
    calibration.add(0, 0, codes[0, 0])
    assert torch.equal(built.histograms.on, before)


def test_activations_above_the_last_edge_fall_into_the_last_bin():
    calibration = calibrated(make_codes(0))
    latent = int(calibration.histograms.candidates[0, 0, 0])
    before = calibration.histograms.on[0, 0, 0, -1].item()
    calibration.add(0, 0, SparseCode(torch.full((1, 1, 1), 1e6), torch.full((1, 1, 1), latent)))
    assert calibration.histograms.on[0, 0, 0, -1].item() == before + 1


def test_a_rate_that_no_threshold_reaches_deselects_the_latent():
    codes = make_codes(0)
    calibration = calibrated(codes)
    for latent in calibration.histograms.candidates[0, 0].tolist():
        strong = SparseCode(torch.full((500, 1, 1), 1e6), torch.full((500, 1, 1), latent))
        calibration.add(1, 0, strong)
    selection = calibration.build().select("Cats", top_k=1)
    assert torch.isposinf(selection.thresholds[0]).all()
    assert torch.isfinite(selection.thresholds[1]).any()


def test_bad_input():
    codes = make_codes(0)
    calibration = calibrated(codes)
    dictionary = calibration.build()
    plain = dictionary.without_histograms()
    with pytest.raises(ValueError, match="calibration keeps 3 candidates"):
        dictionary.select("Cats", top_k=4)
    with pytest.raises(ValueError, match="calibration keeps 3 candidates"):
        dictionary.select("Cats", percentile=20)
    with pytest.raises(ValueError, match=r"false_positive: expected a rate in \(0, 1\)"):
        dictionary.select("Cats", false_positive=0.0)
    with pytest.raises(ValueError, match=r"expected 1 <= candidates <= 12"):
        Calibration(plain, candidates=13)
    with pytest.raises(ValueError, match="expected >= 2 concepts, got 1"):
        Calibration(ConceptDictionary(("Cats",), TIMESTEPS, torch.ones(1, 2, L), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="largest activation is 0"):
        Calibration(ConceptDictionary(CONCEPTS, TIMESTEPS, torch.zeros(3, 2, L), torch.ones(3, 2)))
    with pytest.raises(ValueError, match="need calibration histograms"):
        plain.detection_rates(plain.select("Cats"))
    with pytest.raises(ValueError, match="other candidates or edges"):
        calibration.histograms.merge(Calibration(plain, candidates=2).histograms)
    with pytest.raises(ValueError, match="calibrations of other concepts, or of one side only"):
        dictionary.merge(plain)
    with pytest.raises(ValueError, match=r"expected indices in \[0, 12\)"):
        calibration.add(0, 0, SparseCode(torch.ones(1, 1, 1), torch.full((1, 1, 1), L)))
    empty = Calibration(plain).build()
    with pytest.raises(ValueError, match="calibration has no patches of 'Cats'"):
        empty.select("Cats")
