"""The site that a dictionary names: scored, kept, and compared with the activations'."""

import json

import pytest
import torch

from lbdt.activations import Site
from lbdt.dictionary import Calibration, ConceptDictionary
from lbdt.dictionary.scoring import score
from lbdt.dictionary.selectivity import selectivity
from tests.dictionary.activations import SITE, TIMESTEPS, Lazy, in_memory, make_sae

OTHER = Site("unet.mid_block.attentions.0")


def make(site=str(SITE), names=("Cats", "Dogs"), **parts):
    mean = torch.rand(len(names), 3, 24, generator=torch.Generator().manual_seed(0))
    return ConceptDictionary(names, TIMESTEPS, mean, torch.ones(len(names), 3), site=site, **parts)


def run(sae, source=None, site=SITE, **options):
    return score(source or in_memory(), site, sae, progress=False, **options)


@pytest.mark.parametrize("site", [SITE, Site(SITE.hookpoint, "update")], ids=str)
def test_score_says_where(tmp_path, site):
    options = {"calibrate": True, "picture_false_positive": 0.5, "selection": {"thresholds": "published"}}
    dictionary = run(
        make_sae(update=site.update).with_site(str(site)), Lazy(), site, folder=tmp_path, **options
    )
    assert dictionary.site == str(site) and dictionary.bank is not None and dictionary.gate is not None
    assert ConceptDictionary.from_pretrained(tmp_path).site == str(site)


def test_an_sae_of_another_site_is_not_scored_unless_it_is_moved():
    sae = make_sae().with_site(str(OTHER))
    with pytest.raises(
        ValueError, match=rf"site {SITE}: the SAE was trained at {OTHER}; .*sae\.with_site\(None\).*cfg\.json"
    ):
        run(sae)
    assert run(sae.with_site(None)).site == str(SITE)


@pytest.mark.parametrize("site", [str(SITE), None], ids=["known", "not known"])
def test_copies_and_files_keep_it(tmp_path, site):
    dictionary = make(site)
    copies = (
        dictionary.replaced(peak=9.0),
        dictionary.without_histograms(),
        Calibration(dictionary, 2).build(),
    )
    assert [copy.site for copy in copies] == [site] * 3
    dictionary.save_pretrained(tmp_path)
    assert ConceptDictionary.from_pretrained(tmp_path).site == site


def test_files_of_the_version_before_have_none(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "dictionary.json"
    info = json.loads(path.read_text())
    assert (info["version"], info.pop("site")) == (7, str(SITE))
    path.write_text(json.dumps(info | {"version": 4}))
    assert ConceptDictionary.from_pretrained(tmp_path).site is None
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="missing or unknown: site"):
        ConceptDictionary.from_pretrained(tmp_path)
    path.write_text(json.dumps(info | {"site": SITE.hookpoint}))
    with pytest.raises(ValueError, match="not a valid dictionary: site: expected None or a name such as"):
        ConceptDictionary.from_pretrained(tmp_path)
    path.write_text(json.dumps(info | {"site": 3}))
    with pytest.raises(ValueError, match="not a valid dictionary: site: .*got 3"):
        ConceptDictionary.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (str(SITE), str(SITE), str(SITE)),
        (None, str(SITE), str(SITE)),
        (str(SITE), None, str(SITE)),
        (None, None, None),
    ],
    ids=["both", "the second", "the first", "neither"],
)
def test_dictionaries_of_one_site_merge(first, second, merged):
    assert make(first).merge(make(second, ("Birds",))).site == merged


def test_dictionaries_of_two_sites_do_not_merge():
    with pytest.raises(ValueError, match=f"dictionaries of {SITE} and of {OTHER}; one SAE per dictionary"):
        make().merge(make(str(OTHER), ("Birds",)))


@pytest.mark.parametrize(
    ("sae_site", "site", "message"),
    [
        (str(OTHER), None, f"site {SITE}: the SAE was trained at {OTHER}"),
        (None, str(OTHER), f"dictionary: made at {OTHER}, and the activations are those of {SITE}"),
        (str(SITE), str(SITE), None),
        (None, None, None),
    ],
    ids=["SAE", "dictionary", "both known", "neither known"],
)
def test_rates_are_those_of_one_site(sae_site, site, message):
    sae, dictionary = make_sae().with_site(sae_site), make(site)
    if message is None:
        assert selectivity(in_memory(), SITE, sae, dictionary, top_k=1).shape == (3, 2)
        return
    with pytest.raises(ValueError, match=message):
        selectivity(in_memory(), SITE, sae, dictionary, top_k=1)
