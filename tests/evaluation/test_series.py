"""Pictures in folders: what is made again, what is not, what is refused, and that judges are asked once."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lbdt.activations.prompts import Prompt
from lbdt.editors import UCE
from lbdt.evaluation.concept_texts import ConceptTexts
from lbdt.evaluation.generation import generate
from lbdt.evaluation.jobs import Design, Job, unedited
from lbdt.evaluation.series import Series, SeriesFiles, slug
from tests import toy
from tests.evaluation import small
from tests.repeats import MISALIGNED, repeats

JOBS = tuple(
    Job(Prompt(f"a {name}".lower(), name, style, seed), ("Cats",))
    for seed, (name, style) in enumerate([("Cats", "ink"), ("Dogs", None), ("Cats", None), ("Trees", "oil")])
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def of(pipe, folder, judge=None, **changes):
    world = small.world(judge=judge or small.Judge(), pipeline=lambda device: pipe, batch=2, **changes)
    return small.evaluation(folder, world)


def series(method="per", jobs=JOBS, **changes):
    settings = {"per": {"padding": 1, "source": "random"}, "steering": {"strength": -4.0}}.get(method, {})
    jobs = tuple(Job(job.prompt) for job in jobs) if method == "base" else jobs
    if method in ("negative", "uce"):
        changes["texts"] = ConceptTexts.of(small.world())
    return Series(f"toy/{method}", changes.pop("kind", small.kind()), method, settings, jobs, **changes)


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["base", "negative", "uce", "steering", "per"])
def test_what_is_there_is_not_made_again_and_what_a_kill_left_without_its_json_is(pipe, tmp_path, method):
    given = series(method)
    of(pipe, tmp_path).make("pictures", [given])
    folder = tmp_path / "toy" / method
    whole = written(folder)
    assert [name for name in whole if name.endswith(".png")] == [
        "0000-00-Cats-ink-0.png",
        "0000-01-Dogs-1.png",
        "0001-00-Cats-2.png",
        "0001-01-Trees-oil-3.png",
    ]
    before = stamps(folder)
    of(pipe, tmp_path).make("pictures", [given])
    assert stamps(folder) == before, "nothing was written"
    (folder / "0001.json").unlink()
    (folder / "0001-01-Trees-oil-3.png").unlink()
    (folder / "0001.safetensors").write_bytes(b"half")
    (folder / "0001-00-Cats-2.png").write_bytes(b"half")
    of(pipe, tmp_path).make("pictures", [given])
    again = written(folder)
    record = [json.loads(files.pop("0001.json")) for files in (whole, again)]
    assert again == whole and record[0]["replaced"] == record[1]["replaced"]
    after = stamps(folder)
    assert {name for name in after if after[name] == before[name]} >= {n for n in after if "0000" in n}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": small.kind(steps=3)}, "steps"),
        ({"kind": small.kind(guidance=2.0)}, "guidance"),
        ({"kind": small.kind(per=lambda **s: toy.eraser(threshold=0.5, **s))}, "method parts"),
        ({"jobs": JOBS[:3]}, "jobs"),
        ({"watched": True}, "watched"),
    ],
    ids=["steps", "guidance", "another-eraser", "pictures", "watched"],
)
def test_a_folder_of_another_setting_is_refused_and_stays(pipe, tmp_path, change, named):
    of(pipe, tmp_path).make("pictures", [series()])
    before = written(tmp_path / "toy" / "per")
    with pytest.raises(ValueError, match=rf"toy/per: holds pictures made otherwise \({named} differ\)"):
        of(pipe, tmp_path).make("pictures", [series(**change)])
    assert written(tmp_path / "toy" / "per") == before


def test_a_folder_that_was_laid_out_otherwise_is_refused_in_words(pipe, tmp_path):
    """As one from before verdicts could name several objects."""
    of(pipe, tmp_path).make("pictures", [series()])
    path = tmp_path / "toy" / "per" / "series.json"
    about = json.loads(path.read_text())
    del about["version"]
    path.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"holds pictures made otherwise \(version differ\).*or another --out"
    ):
        of(pipe, tmp_path).make("pictures", [series()])


def test_verdicts_of_single_labels_from_an_earlier_layout_are_not_read(pipe, tmp_path):
    run = of(pipe, tmp_path)
    run.make("pictures", [series()])
    judge = run.scorers.judge
    name = hashlib.sha256(f"{judge.name}, {judge.features_name}".encode()).hexdigest()[:8]
    assert not (tmp_path / "toy" / "per" / f"0000.{name}.safetensors").exists()
    seen = run.files(series()).judge(0, judge).objects
    assert seen.dtype == torch.bool and seen.shape == (2, 3)


def test_other_texts_are_another_series(pipe, tmp_path):
    of(pipe, tmp_path).make("pictures", [series("uce")])
    other = ConceptTexts(toy.CONCEPTS, lambda name: [f"a {name}" if name else "a"])
    with pytest.raises(ValueError, match=r"toy/uce: .* \(method parts differ\)"):
        of(pipe, tmp_path).make("pictures", [replace(series("uce"), texts=other)])


def called(pipe, jobs, **call):
    return pipe(
        [job.prompt.text for job in jobs],
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(job.prompt.seed) for job in jobs],
        **call,
    ).images


def test_a_negative_prompt_is_the_erased_concept_of_every_picture(pipe):
    jobs = (*JOBS[:2], Job(JOBS[2].prompt, ("Dogs",)), Job(JOBS[3].prompt, ("Cats", "Trees")))
    given = series("negative", jobs, kind=small.kind(guidance=4.0))
    pictures, tensors, record = generate(pipe, given, given.editors(), jobs, None)
    texts = ["Cats", "Cats", "Dogs", "Cats, Trees"]
    assert repeats(pictures, called(pipe, jobs, guidance_scale=4.0, negative_prompt=texts))
    assert not repeats(pictures[0], called(pipe, jobs, guidance_scale=4.0)[0])
    assert "changed" not in tensors and record["replaced"] == []


def test_uce_edits_the_model_for_each_erased_concept_of_a_batch_and_restores_it(pipe):
    jobs = (JOBS[0], Job(JOBS[1].prompt, ("Dogs",)), JOBS[2], Job(JOBS[3].prompt, ("Dogs",)))
    before = [weight.clone() for weight in pipe.unet.state_dict().values()]
    given = series("uce", jobs)
    pictures, _, _ = generate(pipe, given, given.editors(), jobs, None)
    assert all(map(torch.equal, pipe.unet.state_dict().values(), before))
    for name, places in (("Cats", (0, 2)), ("Dogs", (1, 3))):
        kept = [other for other in toy.CONCEPTS if other != name]
        with UCE([(name, "")], [*kept, ""], preserve_scale=1 / 3).attach(pipe):
            expected = called(pipe, [jobs[n] for n in places], guidance_scale=1.0)
        assert repeats([pictures[n] for n in places], expected)


def test_texts_that_do_not_pair_up_are_refused():
    texts = ConceptTexts(("Cats", "Dogs"), lambda name: ["a", "b"] if name == "Cats" else ["c"])
    with pytest.raises(ValueError, match="texts: expected 1 of Cats, as there are of no concept, got 2"):
        texts.editing(("Cats",))
    edits = texts.editing(("Dogs",))
    assert (edits.edits, edits.preserve) == ((("c", "c"),), ("a", "b", "c"))
    assert texts.negative(("Cats", "Dogs")) == "a, c"


@pytest.mark.parametrize("method", ["per", "steering"])
def test_pictures_in_which_no_patch_was_changed_are_those_of_the_base(pipe, method):
    """Some are not treated at all, and in one nothing is detected."""
    jobs = (JOBS[0], unedited(JOBS[1]), JOBS[2], unedited(JOBS[3]))
    given = series(method, jobs)
    bare = series("base", jobs)
    found, plain = (generate(pipe, each, each.editors(), jobs, None)[1] for each in (given, bare))
    assert "changed" not in plain and found["changed"].shape == (4,)
    assert (found["changed"] > 0).tolist() == [True, False, True, False]
    same = (found["digests"] == plain["digests"]).tolist()
    assert same == [False, True, False, True]


def test_patches_changed_are_added_up_over_attachments_steps_and_halves(pipe):
    jobs = tuple(Job(job.prompt, ("Cats", "Dogs")) for job in JOBS[:2])
    kind = small.kind(guidance=3.0)
    both, stacked = (series("per", jobs, kind=kind, stacked=flag) for flag in (False, True))
    counts = []
    for given in (both, stacked):
        _, tensors, record = generate(pipe, given, given.editors(), jobs, None)
        counts.append(tensors["changed"])
        # 2 images, 2 halves, 2 steps, 16 patches.
        assert int(tensors["changed"].sum()) == round(sum(record["replaced"]) * 128)
    assert counts[0].dtype == counts[1].dtype == torch.int64


def test_another_pipeline_batch_or_number_of_threads_is_refused(pipe, tmp_path):
    of(pipe, tmp_path).make("pictures", [series()])
    other = of(pipe, tmp_path)
    other.world = small.world(pipeline=lambda device: pipe, batch=4)
    with pytest.raises(ValueError, match="batch differ"):
        other.make("pictures", [series()])
    with pytest.raises(ValueError, match="pipeline, threads differ"):
        about = of(pipe, tmp_path).files(series()).about
        SeriesFiles(tmp_path, series(), 2, about | {"pipeline": "x", "threads": 9}).prepare()


def test_pictures_do_not_depend_on_the_batch_but_in_their_last_bits(pipe, tmp_path):
    """A picture's noise and donors follow its own seed."""
    of(pipe, tmp_path / "two").make("pictures", [series()])
    other = of(pipe, tmp_path / "four")
    other.world = small.world(judge=small.Judge(), pipeline=lambda device: pipe, batch=4)
    other.make("pictures", [series()])
    pixels = []
    for folder in ("two", "four"):
        paths = sorted((tmp_path / folder / "toy" / "per").glob("*.png"), key=lambda path: path.stem[-3:])
        pixels.append(torch.stack([torch.from_numpy(np.array(Image.open(p))).int() for p in paths]))
    assert int((pixels[0] - pixels[1]).abs().max()) <= 1


def test_an_edit_changes_the_pictures_and_is_that_of_the_eraser_itself(pipe, tmp_path):
    run = of(pipe, tmp_path)
    run.make("pictures", [series("base"), series("per")])
    bare, edited = (run.files(series(method)).pictures(0) for method in ("base", "per"))
    with small.per(padding=1, source="random").attach(pipe, concepts=[["Cats"], ["Cats"]], seed=[0, 1]):
        expected = pipe(
            [job.prompt.text for job in JOBS[:2]],
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        ).images
    assert repeats(edited, expected)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(bare, edited, strict=True))


def test_masks_are_kept_of_pictures_that_name_the_erased_concept(pipe, tmp_path):
    run = of(pipe, tmp_path)
    run.make("pictures", [series()])
    got = [run.files(series()).tensors(index, ("timesteps", "own", "cells")) for index in (0, 1)]
    assert [part["own"].tolist() for part in got] == [[0], [0]]
    for index, part in enumerate(got):
        assert part["cells"].shape == (1, 2, 4, 4) and len(part["timesteps"]) == 2
        detected, replaced = part["cells"] & 1, part["cells"] >> 1
        assert 0 < detected.sum() and 0 < replaced.sum()
        for step in range(2):  # where padding leaves no donor, nothing is replaced
            assert not replaced[0, step].any() or bool((replaced >= detected)[0, step].all())
        share = run.files(series()).record(index)["replaced"]
        assert len(share) == 1 and 0 < share[0] <= 1


def test_one_attachment_for_each_concept_works_in_the_order_of_the_requests(pipe, tmp_path):
    jobs = tuple(Job(job.prompt, ("Cats", "Dogs")) for job in JOBS[:2])
    swapped = tuple(Job(job.prompt, ("Dogs", "Cats")) for job in JOBS[:2])
    found = {}
    for name, mine, stacked in (("both", jobs, False), ("turns", jobs, True), ("swapped", swapped, True)):
        run = of(pipe, tmp_path / name)
        given = series(jobs=mine, stacked=stacked)
        run.make("pictures", [given])
        found[name] = run.files(given).pictures(0)[0].tobytes(), run.files(given).record(0)["replaced"]
    assert [len(found[name][1]) for name in found] == [1, 2, 2]
    assert len({picture for picture, _ in found.values()}) == 3


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"no picture", lambda data: data[: len(data) // 2], lambda data: None],
    ids=["other-bytes", "cut-off", "missing"],
)
def test_a_damaged_picture_is_named_with_what_to_do(pipe, tmp_path, damage):
    of(pipe, tmp_path).make("pictures", [series()])
    path = tmp_path / "toy" / "per" / "0001-00-Cats-2.png"
    data = damage(path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    judge = small.Judge(name="another")
    with pytest.raises(ValueError, match=r"0001-00-Cats-2.png: not a readable picture.*remove .*0001.json"):
        of(pipe, tmp_path, judge).make("pictures", [series()])
    (tmp_path / "toy" / "per" / "0001.json").unlink()
    of(pipe, tmp_path, judge).make("pictures", [series()])
    assert judge.calls == 2, "what was judged before the failure is not judged again"


def test_damaged_masks_are_named_and_made_again_as_the_error_says(pipe, tmp_path):
    run = of(pipe, tmp_path)
    run.make("pictures", [series()])
    path = tmp_path / "toy" / "per" / "0001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"0001.safetensors: not readable.*remove .*0001.json to make"):
        run.files(series()).tensors(1, ("cells",))
    (path.parent / "0001.json").unlink()
    of(pipe, tmp_path).make("pictures", [series()])
    assert path.read_bytes() == whole


def test_a_judge_is_asked_once_for_each_batch(pipe, tmp_path):
    judge = small.Judge()
    run = of(pipe, tmp_path, judge)
    run.make("pictures", [series()])
    assert (judge.calls, judge.pictures) == (2, 4)
    run.make("pictures", [series()])
    first = [run.files(series()).judge(index, judge) for index in (0, 1)]
    run.columns(series())
    assert judge.calls == 2
    objects, styles, features = small.Judge()(run.files(series()).pictures(1))
    assert torch.equal(first[1].objects, objects) and torch.equal(first[1].styles, styles)
    assert torch.equal(first[1].features, features)


def test_verdicts_of_another_judge_or_after_damage_are_asked_for_again(pipe, tmp_path):
    of(pipe, tmp_path).make("pictures", [series()])
    other, blind = small.Judge(name="another"), small.Judge(name="blind", styles=False)
    of(pipe, tmp_path, other).make("pictures", [series()])
    assert other.calls == 2
    files = of(pipe, tmp_path).files(series())
    assert files.judge(0, blind).styles is None and files.judge(0, blind).styles is None
    assert blind.calls == 1
    damaged = max(tmp_path.glob("toy/per/0000.*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    damaged.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{damaged.name}: not readable.*remove it, and run"):
        files.judge(0, blind)
    damaged.unlink()
    files.judge(0, blind)
    assert blind.calls == 2


def test_two_processes_make_each_batch_once(pipe, tmp_path):
    """Without a group: what rank r of n takes is every n-th batch of all series."""
    from lbdt.runs.processes import Processes

    class Rank(Processes):
        def wait(self):
            pass

    both = [series("base"), series("per", jobs=JOBS[:3])]
    judges = [small.Judge(), small.Judge()]
    for rank, judge in enumerate(judges):
        run = of(pipe, tmp_path / "two", judge)
        run.processes = Rank(rank, 2)
        run.make("pictures", both)
    assert [judge.calls for judge in judges] == [2, 2]
    of(pipe, tmp_path / "one").make("pictures", both)
    for name in ("base", "per"):
        one, two = (
            {n: d for n, d in written(tmp_path / which / "toy" / name).items() if n[4:] != ".json"}
            for which in ("one", "two")
        )
        assert one.keys() == two.keys()
        if MISALIGNED:  # verdicts on the sum of a picture's bytes differ with its last bit
            one, two = ({n: d for n, d in files.items() if n.count(".") == 1} for files in (one, two))
        assert repeats(one, two)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("unet.up_blocks.0.attentions.1", "unet.up-blocks.0.attentions.1"),
        ("a/b: c", "a-b-c"),
        ("../..", "none-0cfd1c96"),
        (".hidden", "hidden-" + hashlib.sha256(b".hidden").hexdigest()[:8]),
        ("a\n\0\ud800b", "a-b"),
        ("x" * 60, "x" * 60),
        ("x" * 300, "x" * 51 + "-" + hashlib.sha256(b"x" * 300).hexdigest()[:8]),
    ]
    + [("猫", "none")],
    ids=["hookpoint", "signs", "dots", "hidden", "control", "longest", "too-long", "no-letter"],
)
def test_text_as_a_file_name(text, name):
    assert slug(text) == name and "/" not in slug(text)


def test_long_names_that_begin_alike_are_different_files():
    assert len({slug("a long name " * 9 + end) for end in ("", "a", "A")}) == 3


def test_a_watched_series_keeps_rows_of_the_block(pipe, tmp_path):
    run = of(pipe, tmp_path)
    given = series(watched=True)
    run.make("pictures", [given])
    rows = run.files(given).tensors(0, ("watched",))["watched"]
    assert rows.shape == (2 * 2 * 4, toy.WIDTH)  # pictures x timesteps x patches


def test_a_design_is_resumed_by_the_same_seeds(pipe, tmp_path):
    judge = small.Judge()
    run = small.evaluation(
        tmp_path,
        small.world(judge=judge, pipeline=lambda device: pipe),
        design=Design(own=1, others=1, counts=()),
    )
    run.run()
    calls = judge.calls
    run.run()
    assert calls > 0 and judge.calls == calls
