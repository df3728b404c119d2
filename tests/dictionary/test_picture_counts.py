"""The gate's counts: what `score` writes, the least number of patches that follows, and files of them."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from lbdt.activations import Prompt
from lbdt.activations.source import label_places
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.dictionary.scoring import score
from tests.dictionary.activations import (
    CONCEPTS,
    PATCHES,
    SITE,
    STYLES,
    TIMESTEPS,
    Lazy,
    in_memory,
    made,
    make_sae,
)
from tests.repeats import repeats


def counts(off, false_positive=0.005, on=(0, 0, 0, 1000)):
    on, off = (torch.tensor(values).view(1, 1, -1) for values in (on, off))
    return PictureCounts(on, off, 16, {}, false_positive)


@pytest.mark.parametrize(
    ("off", "rate", "least"),
    [
        pytest.param([1000, 0, 0, 0], 0.005, 1, id="nothing-detected"),
        pytest.param([995, 5, 0, 0], 0.005, 1, id="just-few-enough"),
        pytest.param([994, 6, 0, 0], 0.005, 2, id="one-too-many"),
        pytest.param([990, 0, 6, 4], 0.005, 3, id="a-gap"),
        pytest.param([0, 0, 0, 1000], 0.005, 3, id="all-beyond-what-was-counted"),
        pytest.param([10, 1, 0, 0], 0.005, 2, id="few-pictures-allow-none"),
        pytest.param([0, 0, 0, 1000], 1.0, 1, id="a-rate-of-one-is-no-gate"),
        pytest.param([0, 0, 0, 0], 0.005, 1, id="no-picture"),
    ],
)
def test_the_least_number_that_few_enough_pictures_reach(off, rate, least):
    gate = counts(off, rate)
    assert gate.least().tolist() == [[least]]
    assert gate.least().dtype == torch.int64


@pytest.mark.parametrize(
    ("on", "least"),
    [
        pytest.param([0, 0, 0, 1000], 3, id="all-have-more"),
        pytest.param([0, 0, 1000, 0], 2, id="none-has-three"),
        pytest.param([0, 10, 0, 990], 3, id="one-percent-has-fewer"),
        pytest.param([0, 11, 0, 989], 1, id="a-little-more-has-fewer"),
        pytest.param([900, 0, 0, 100], 3, id="undetected-ones-do-not-count"),
        pytest.param([1000, 0, 0, 0], 1, id="never-detected"),
        pytest.param([0, 0, 0, 0], 1, id="no-picture"),
    ],
)
def test_a_concepts_own_pictures_come_first(on, least):
    gate = counts([10, 0, 0, 90], on=on)
    assert gate.least().tolist() == [[least]]
    assert float(gate.passing()[0]) >= 0.99 * (1 - on[0] / max(sum(on), 1)) - 1e-9 or not any(on)


def test_a_wrong_label_does_not_hide_a_concept():
    """Of 150 pictures, 50 a concept, one of another concept shows this one on most of its patches."""
    x, concept, _ = made(0, 150)
    x[(concept == 1).nonzero()[0], :, :5, 0] += 4
    gate = score(in_memory(150, 50, x=x), SITE, make_sae(), progress=False).gate
    assert (gate.passing()[0][0] > 0.9).all() and gate.off[0, :, 4 * 5].sum() > 0


def test_the_shares_that_pass():
    on, off = counts([990, 0, 6, 4], on=[10, 0, 0, 990]).passing()
    assert (float(on), float(off)) == (0.99, 0.004)


@pytest.fixture(scope="module")
def scored():
    return score(in_memory(60), SITE, make_sae(), picture_false_positive=0.2, progress=False)


def test_score_counts_every_labelled_picture(scored):
    source, gate = in_memory(60), scored.gate
    label = torch.cat([source.shard(i, SITE).concepts for i in range(15)])
    x = torch.cat([source.shard(i, SITE).x for i in range(15)]).float()
    assert (gate.patches, gate.selection, gate.false_positive) == (PATCHES, {}, 0.2)
    for place, name in enumerate(CONCEPTS):
        chosen, sums = scored.select(name), torch.zeros(60, dtype=torch.int64)
        for bin in range(len(TIMESTEPS)):
            z = torch.zeros(60, PATCHES, scored.num_latents)
            code = make_sae().encode(x[:, bin])
            z.scatter_(-1, code.indices.long(), code.values)
            sums += (z[..., chosen.latents] > chosen.thresholds[bin]).any(-1).sum(-1)
            found = sums * 4 // (bin + 1)  # quarters of the mean so far
            for group, pictures in ((gate.on, label == place), (gate.off, (label >= 0) & (label != place))):
                assert (
                    group[place, bin].tolist() == found[pictures].bincount(minlength=4 * PATCHES + 1).tolist()
                )


class Several(Lazy):
    """Every fourth prompt shows a second concept, on other patches than its own."""

    def __init__(self, prompts=60):
        super().__init__(prompts)
        _, concept, _ = made(0, prompts)
        self.labelled = tuple(
            Prompt("text", None if label < 0 else CONCEPTS[label], seed=n, beside=beside(n, label))
            for n, label in enumerate(concept.tolist())
        )

    def shard(self, index, site):
        whole = super().shard(index, site)
        x, concept = whole.x.clone(), whole.concepts.clone()
        for n, prompt in enumerate(self.labelled[index * self.prompts_per_shard :][: len(x)]):
            if prompt.beside:
                x[n, :, 1, CONCEPTS.index(prompt.beside[0])] += 4
                concept[n] = -1
        return whole._replace(x=x, concepts=concept)

    def labels(self):
        return label_places(self.labelled, CONCEPTS, STYLES)


def beside(number, label):
    return (CONCEPTS[(label + 1) % 3],) if number % 4 == 1 and label >= 0 else ()


@pytest.mark.parametrize("processes", [1, 2])
def test_pictures_of_several_concepts_are_counted_for_each_and_in_nothing_else(scored, tmp_path, processes):
    several, given = Several(), {"picture_false_positive": 0.2, "progress": False}
    run = partial(score, in_memory(60), SITE, make_sae(), gate_source=several, **given)
    if processes == 1:
        dictionary = run()
    else:
        with ThreadPoolExecutor(2) as pool:
            each = [pool.submit(run, folder=tmp_path, process=p, processes=2) for p in (0, 1)]
        dictionary = each[0].result()
        assert torch.equal(dictionary.gate.on, each[1].result().gate.on)
    gate = dictionary.gate
    assert not scored.gate.several
    assert repeats(dictionary.mean, scored.mean) and repeats(dictionary.bank, scored.bank)
    for place, name in enumerate(CONCEPTS):
        assert gate.several[place] == sum(name in p.shown for p in several.labelled if p.beside) > 0
        own = [name in prompt.shown for prompt in several.labelled]
        others = [bool(prompt.shown) and name not in prompt.shown for prompt in several.labelled]
        assert (gate.on[place].sum(-1) == sum(own)).all() and sum(own) > 20
        assert (gate.off[place].sum(-1) == sum(others)).all()
    # A second concept lies on one patch, its own picture's on three.
    assert gate.on[:, -1].sum() > scored.gate.on[:, -1].sum() and (gate.on[:, -1, 4] > 0).all()


class Sampled(Lazy):
    def shard(self, index, site):
        whole = super().shard(index, site)
        return whole._replace(patches=whole.patches + (whole.patches >= 3))


class Wrong(Several):
    def __init__(self, timesteps=TIMESTEPS, without=None):
        super().__init__()
        self.timesteps = timesteps
        self.labelled = tuple(p for p in self.labelled if without not in p.shown)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (
            Wrong(timesteps=(900, 500, 1)),
            {},
            "gate_source: expected the source's timesteps 901, 501, 1, got 900",
        ),
        (
            Wrong(without="Dogs"),
            {},
            "gate_source: expected pictures of every one of the concepts, got none of Dogs",
        ),
        (Several(), {"picture_false_positive": None}, "gate_source: is for a gate"),
        (Sampled(60), {}, "gate_source: holds some patches of each map"),
    ],
    ids=["timesteps", "concepts", "no-gate", "sampled"],
)
def test_a_source_that_the_gate_cannot_count_is_refused_at_the_door(given, more, message):
    source = Lazy()
    with pytest.raises(ValueError, match=message):
        score(source, SITE, make_sae(), gate_source=given, progress=False, **more)
    assert not source.asked


def test_a_source_for_the_gate_of_a_single_concept_is_refused():
    alone = in_memory()
    alone.concepts, alone._concept = ("Cats",), torch.zeros_like(alone._concept)
    with pytest.raises(
        ValueError, match="gate_source: a gate tells concepts apart, and there is 'Cats' only"
    ):
        score(alone, SITE, make_sae(), gate_source=alone, calibrate=False, progress=False)


def test_no_gate_where_none_is_asked_for_or_there_is_nothing_to_tell_apart():
    assert score(in_memory(), SITE, make_sae(), picture_false_positive=None, progress=False).gate is None
    alone = in_memory()
    alone.concepts = ("Cats",)
    alone._concept = torch.zeros_like(alone._concept)
    assert score(alone, SITE, make_sae(), calibrate=False, progress=False).gate is None


def test_no_gate_of_sampled_patches():
    with pytest.warns(UserWarning, match="no gate: the activations hold some patches of each map"):
        assert score(Sampled(), SITE, make_sae(), progress=False).gate is None


def test_a_label_that_selects_nothing_has_no_gate_and_does_not_end_the_run():
    source = in_memory()
    selection = {"thresholds": "published", "percentile": 99.9}
    sae = make_sae()
    sae.encoder.weight[2], sae.encoder.bias[2] = 0, -100.0
    dictionary = score(source, SITE, sae, selection=selection, bank=0, calibrate=False, progress=False)
    assert dictionary.gate.patches == PATCHES


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, True, "much"])
def test_bad_rates_are_refused_at_the_door(rate):
    source = Lazy()
    with pytest.raises(ValueError, match="picture_false_positive: expected a share in"):
        score(source, SITE, make_sae(), picture_false_positive=rate, progress=False)
    assert not source.asked


@pytest.mark.parametrize(
    ("selection", "same"),
    [
        ({}, True),
        ({"false_positive": 0.02}, True),
        ({"top_k": None}, True),
        ({"false_positive": 0.01}, False),
        ({"top_k": 1}, False),
        ({"thresholds": "published"}, False),
    ],
    ids=str,
)
def test_it_is_for_the_selection_that_was_counted(scored, selection, same):
    assert scored.gate.is_for(selection) is same


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_files(scored, tmp_path, dtype):
    scored.save_pretrained(tmp_path, dtype=dtype)
    back = ConceptDictionary.from_pretrained(tmp_path).gate
    assert torch.equal(back.on, scored.gate.on) and torch.equal(back.off, scored.gate.off)
    assert torch.equal(back.least(), scored.gate.least()) and back.is_for({})
    assert (back.patches, back.false_positive, back.over) == (PATCHES, 0.2, "run")


def test_a_gate_of_an_older_file_counts_a_call(scored, tmp_path):
    scored.save_pretrained(tmp_path)
    path = tmp_path / "dictionary.json"
    info = json.loads(path.read_text())
    info["version"] = 5
    del info["gate"]["over"], info["gate"]["several"]
    path.write_text(json.dumps(info))
    assert ConceptDictionary.from_pretrained(tmp_path).gate.over == "call"


@pytest.mark.parametrize("version", [5, 6])
def test_a_gate_of_an_older_file_counted_pictures_of_one_concept(scored, tmp_path, version):
    scored.save_pretrained(tmp_path)
    path = tmp_path / "dictionary.json"
    info = json.loads(path.read_text())
    info["version"] = version
    for name in ("several", "over")[: 7 - version]:
        del info["gate"][name]
    path.write_text(json.dumps(info))
    assert ConceptDictionary.from_pretrained(tmp_path).gate.several == ()


@pytest.mark.parametrize(
    ("several", "least"),
    [
        pytest.param((), [6, 6], id="none"),
        pytest.param((10, 0), [13, 6], id="of-one-concept-only"),
        pytest.param((9, 100), [6, 13], id="too-few-of-one"),
        pytest.param((10, 50), [13, 13], id="of-both"),
    ],
)
def test_the_limit_is_whole_for_concepts_of_which_enough_pictures_show_others_too(several, least):
    on, off = torch.zeros(2, 1, 20, dtype=torch.int64), torch.zeros(2, 1, 20, dtype=torch.int64)
    on[..., 13], off[..., 19] = 100, 100
    counted = PictureCounts(on, off, 16, {}, 0.005, "run", several=several)
    counted.check(2, 1)
    assert counted.least().flatten().tolist() == least


def test_over_a_run_half_of_what_its_own_pictures_have_is_enough():
    on, off = torch.zeros(1, 1, 20, dtype=torch.int64), torch.zeros(1, 1, 20, dtype=torch.int64)
    on[..., 13], off[..., 19] = 100, 100
    gates = [PictureCounts(on, off, 16, {}, 0.005, over).least().item() for over in ("call", "run")]
    assert gates == [13, 6]


@pytest.mark.parametrize(
    ("timesteps", "late"), [(1, 0), (3, 0), (4, 1), (20, 3), (50, 8)], ids=lambda value: str(value)
)
def test_over_a_run_its_own_pictures_come_first_but_at_its_beginning(timesteps, late):
    on, off = ([[values] * timesteps] for values in ([0, 1000, 0, 0], [10, 0, 0, 90]))
    gate = PictureCounts(torch.tensor(on), torch.tensor(off), 16, {}, 0.005, "run")
    assert gate.least().tolist() == [[4] * late + [1] * (timesteps - late)]


GATE = {"patches": 6, "selection": {}, "false_positive": 0.1, "over": "run", "several": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "gate: expected null or an object"),
        (
            {"patches": 6, "selection": {}},
            "gate: expected null or an object of false_positive, over, patches, selection, several",
        ),
        ({**GATE, "patches": 0}, "gate patches: expected an integer in"),
        ({**GATE, "selection": {"x": 1}}, "gate selection: unknown key 'x'"),
        ({**GATE, "selection": []}, "gate selection: expected keywords"),
        ({**GATE, "selection": {"top_k": 0}}, "top_k: expected an integer >= 1"),
        ({**GATE, "false_positive": 0}, "picture_false_positive: expected a share"),
        ({**GATE, "over": "day"}, "gate over: expected one of call, run"),
        ({**GATE, "several": 1}, "gate several: expected no number or 3, got 1"),
        ({**GATE, "several": [1]}, "gate several: expected no number or 3, got tuple"),
        ({**GATE, "several": [1, -1, 0]}, "gate several: expected integers >= 0"),
    ],
    ids=[
        "list",
        "keys",
        "patches",
        "unknown",
        "selection",
        "criteria",
        "rate",
        "over",
        "several",
        "count",
        "negative",
    ],
)
def test_bad_files(scored, tmp_path, change, message):
    scored.save_pretrained(tmp_path)
    path = tmp_path / "dictionary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": change}))
    with pytest.raises(ValueError, match=message):
        ConceptDictionary.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"off": torch.zeros(1, 1, 3).long()}, "of one shape"),
        ({"on": torch.zeros(2, 1, 4).long()}, "gate on: expected shape"),
        ({"off": -torch.ones(1, 1, 4).long()}, "gate off: expected finite values >= 0"),
    ],
    ids=["other-shape", "other-concepts", "negative"],
)
def test_bad_counts(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(counts([1, 0, 0, 0]), **changes).check(1, 1)


def test_a_merged_dictionary_has_no_gate(scored):
    plain = scored.replaced(histograms=None)
    assert plain.gate is not None and plain.merge(plain).gate is None
