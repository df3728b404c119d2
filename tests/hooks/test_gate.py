"""An eraser with a gate on the toy pipeline: images with too few detected patches keep every bit."""

import dataclasses
import json

import pytest
import torch

from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.editors import ConceptEraser
from tests import toy
from tests.repeats import repeats

NAMES = list(toy.CONCEPTS)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def base(pipe):
    return toy.images(pipe)


def erased(pipe, eraser, concepts=NAMES, **call):
    with eraser.attach(pipe, concepts=concepts) as attached:
        return toy.images(pipe, **call), attached.report()


def with_gate(eraser, least: int, patches: int = 16, **selection):
    """The eraser, its dictionary calibrated to `least` patches for every concept."""
    shape = len(toy.CONCEPTS), len(toy.TIMESTEPS), 18
    on, off = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    on[..., -1], off[..., least - 1] = 10, 10
    selection = selection or eraser.selection
    eraser.dictionary = eraser.dictionary.replaced(gate=PictureCounts(on, off, patches, selection, 0.005))
    return eraser


def test_without_enough_patches_an_image_keeps_its_bits(pipe, base):
    after, report = erased(pipe, toy.eraser(min_patches=17))
    assert repeats(after, base)
    assert report.detected == report.replaced == 0 and report.gated == 6
    assert "2 gated" in str(report) and report.to_dict()["gated"] == 6


def test_one_is_off(pipe, base):
    published, report = erased(pipe, toy.eraser())
    after, same = erased(pipe, toy.eraser(min_patches=1))
    assert repeats(after, published) and not torch.equal(after, base)
    assert same == report and report.gated == 0


@pytest.mark.parametrize("where", ["output", "another block"])
def test_the_conditional_row_decides_for_both(pipe, where):
    """Every row's mask is that of an eraser without a gate, or empty for both rows of the image."""
    options = {"detect_at": toy.DETECT_AT} if where == "another block" else {}

    def masks(least):
        seen = []
        eraser = toy.eraser(min_patches=least, padding=0, **options)
        with eraser.attach(pipe, concepts=["Cats"], keep_masks=True) as attached:
            toy.images(pipe, ("a", "b", "ab"), steps=1)
            seen = [call.cells.flatten(1) & 1 for call in attached._recorder.read()]
        return seen[0]

    free = masks(1)
    counts = free[3:].sum(1)
    least = int(counts.max())
    assert counts.min() < least, "the toy's images are alike: no gate tells them apart"
    gated = masks(least)
    for image in range(3):
        for row in (image, image + 3):
            expected = free[row] if counts[image] >= least else torch.zeros_like(free[row])
            assert torch.equal(gated[row], expected)


def test_an_image_is_decided_alone(pipe):
    eraser = toy.eraser(min_patches=6)
    together, _ = erased(pipe, eraser, prompts=("cat", "dog"))
    alone, _ = erased(pipe, eraser, prompts=("cat",))
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize("least", [1, 6, 17])
def test_none_takes_what_was_calibrated(pipe, least):
    calibrated = with_gate(toy.eraser(), least)
    after, report = erased(pipe, calibrated)
    expected, wanted = erased(pipe, toy.eraser(min_patches=least))
    assert repeats(after, expected) and report == wanted


@pytest.mark.parametrize(
    ("least", "patches", "here"),
    [
        pytest.param(6, 64, 2, id="smaller"),  # 16 patches: a quarter of 6, rounded up
        pytest.param(2, 8, 4, id="larger"),
        pytest.param(1, 4, 1, id="one-is-off"),
    ],
)
def test_it_is_scaled_to_the_map(pipe, least, patches, here):
    after, report = erased(pipe, with_gate(toy.eraser(), least, patches=patches))
    expected, wanted = erased(pipe, toy.eraser(min_patches=here))
    assert repeats(after, expected) and report == wanted


def test_a_concept_beside_another_is_left_no_more_than_alone(pipe):
    """Cats and Dogs are one latent; Cats need more patches than there are, Dogs one."""
    eraser = with_gate(toy.eraser(), 1)
    mean = eraser.dictionary.mean.clone()
    mean[1] = mean[0]
    gate = eraser.dictionary.gate
    off = gate.off.clone()
    off[0, :, 0], off[0, :, 16] = 0, 10
    eraser.dictionary = eraser.dictionary.replaced(mean=mean, gate=dataclasses.replace(gate, off=off))
    alone, _ = erased(pipe, eraser, ["Dogs"])
    for names in (["Cats", "Dogs"], ["Dogs", "Cats"]):
        assert repeats(erased(pipe, eraser, names)[0], alone)
    left, report = erased(pipe, eraser, ["Cats"])
    assert repeats(left, toy.images(pipe)) and report.gated > 0 and not torch.equal(alone, left)


def test_another_selection_than_calibrated_is_not_gated(pipe):
    eraser = toy.eraser()
    mean = eraser.dictionary.mean.clone()
    mean[0, :, 40] = 0.01  # the second best latent of the first concept
    eraser.dictionary = eraser.dictionary.replaced(mean=mean)
    eraser = with_gate(eraser, 17, top_k=2)
    after, report = erased(pipe, eraser, ["Cats"])
    expected, _ = erased(pipe, toy.eraser(), ["Cats"])
    assert repeats(after, expected) and report.gated == 0
    after, report = erased(pipe, eraser, ["Dogs"])  # whose latents are those that were counted
    assert repeats(after, toy.images(pipe)) and report.gated > 0


def test_the_same_latents_by_other_keywords_are_gated(pipe):
    after, report = erased(pipe, with_gate(toy.eraser(), 17, top_k=1, thresholds="published"))
    expected, wanted = erased(pipe, toy.eraser(min_patches=17))
    assert repeats(after, expected) and report == wanted


def test_selections_that_are_given_are_gated_by_their_own_counts(pipe):
    eraser = with_gate(toy.eraser(), 17)
    chosen = {name: eraser.select(name) for name in NAMES}
    with eraser.attach(pipe, concepts=NAMES, selections=chosen) as attached:
        after = toy.images(pipe)
    expected, wanted = erased(pipe, eraser)
    assert repeats(after, expected) and attached.report() == wanted and wanted.gated == 6
    lower = {
        name: dataclasses.replace(s, thresholds=s.thresholds / 2, criteria=None) for name, s in chosen.items()
    }
    with eraser.attach(pipe, concepts=NAMES, selections=lower) as attached:
        toy.images(pipe)
    assert attached.report().gated == 0 < attached.report().detected


def test_selections_of_another_dictionary_are_refused(pipe):
    eraser = toy.eraser()
    cut = dataclasses.replace(eraser.select("Cats"), thresholds=eraser.select("Cats").thresholds[:2])
    with pytest.raises(
        ValueError, match="selections: 'Cats' has thresholds for 2 timesteps, and the dictionary 4"
    ):
        eraser.attach(pipe, concepts=["Cats"], selections={"Cats": cut})
    assert toy.traces(pipe) == []


def test_it_is_saved_and_older_files_have_none(tmp_path):
    toy.eraser(min_patches=5).save_pretrained(tmp_path)
    assert ConceptEraser.from_pretrained(tmp_path).min_patches == 5
    path = tmp_path / "eraser.json"
    settings = json.loads(path.read_text())
    del settings["min_patches"]
    path.write_text(json.dumps(settings))
    assert ConceptEraser.from_pretrained(tmp_path).min_patches is None


def test_its_digest_tells_gates_apart():
    digests = [toy.eraser(min_patches=n).digest() for n in (None, 1, 2)] + [
        with_gate(toy.eraser(), 2).digest()
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (2**31, ValueError), (True, TypeError), (1.5, TypeError)], ids=str
)
def test_bad_numbers_are_refused(value, error):
    with pytest.raises(error, match="min_patches: expected"):
        toy.eraser(min_patches=value)
