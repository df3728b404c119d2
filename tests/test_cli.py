"""The command line on a tiny pipeline and eraser saved to a folder."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lbdt import cli
from lbdt.cli import env
from lbdt.cli import erase_picture as picture
from tests import toy
from tests.repeats import repeats


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    toy.eraser().save_pretrained(root / "eraser")
    return {"model": str(root / "pipe"), "eraser": str(root / "eraser")}


def lbdt(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def erase(folders, tmp_path, *more: str, prompt: str = "a cat", concept: str = "Cats"):
    places = ["--model", folders["model"], "--eraser", folders["eraser"], "--out", str(tmp_path / "out.png")]
    return lbdt("erase", prompt, "--concept", concept, *places, "--steps", "3", "--device", "cpu", *more)


def test_erase_writes_the_picture_and_the_table(folders, tmp_path):
    done = erase(folders, tmp_path)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == picture.picture_size(16, 16)
    for word in ("patches detected", "patches replaced", "seconds", "Cats", toy.HOOKPOINT, "out.png"):
        assert word in done.stdout
    assert "classifiers" not in done.stdout


def test_json_is_all_there_is_on_stdout(folders, tmp_path):
    more = (
        "--json",
        "--padding",
        "2",
        "--source",
        "row",
        "--avoid",
        "known",
        "--guidance",
        "2.5",
        "--seed",
        "9",
    )
    done = erase(folders, tmp_path, *more, "--concept", "Dogs")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["concepts"] == ["Cats", "Dogs"] and values["verdict"] is None
    assert (values["padding"], values["source"], values["avoid"]) == (2, "row", "known")
    assert (values["guidance"], values["seed"]) == (2.5, 9)
    assert [step["rows"] for step in values["report"]["steps"]] == [2, 2, 2]
    assert 0 < values["report"]["detected"] <= 1
    assert values["seconds"]["with"] > 0 and isinstance(values["overhead_percent"], float)


def test_the_same_seed_gives_the_same_picture(folders, tmp_path):
    pictures = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert erase(folders, tmp_path / name, "--seed", "3").exit_code == 0
        pictures.append((tmp_path / name / "out.png").read_bytes())
    assert repeats(*pictures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concept": "cat"}, "did you mean 'Cats'"),
        ({"more": ("--device", "cuda:77")}, "--device cuda:77: not usable here"),
        ({"more": ("--out", "picture.txt")}, "--out picture.txt: no picture format"),
        ({"more": ("--out", __file__ + "/picture.png")}, "cannot write in " + __file__),
        ({"more": ("--eraser", "/nowhere")}, "/nowhere: no such folder"),
        ({"more": ("--model", "/nowhere")}, "/nowhere"),
    ],
    ids=["concept", "device", "out", "out-folder", "eraser", "model"],
)
def test_a_failure_is_one_line_and_exit_code_1(folders, tmp_path, change, message):
    failed = erase(folders, tmp_path, *change.get("more", ()), concept=change.get("concept", "Cats"))
    assert failed.exit_code == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("lbdt: ")]
    assert len(lines) == 1 and message in lines[0]
    assert failed.stdout == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["erase", "a cat"],
        ["erase", "a cat", "--concept", "Cats", "--padding", "-1"],
        ["erase", "a cat", "--concept", "Cats", "--source", "noise"],
        ["erase", "a cat", "--concept", "Cats", "--steps", "0"],
        ["erase", "a cat", "--concept", "Cats", "--model", "somewhere"],
        ["paint"],
    ],
    ids=["no_concept", "padding", "source", "steps", "model_without_eraser", "unknown_command"],
)
def test_bad_usage_is_exit_code_2(arguments):
    assert lbdt(*arguments).exit_code == 2


def test_concepts(folders):
    done = lbdt("concepts", "--eraser", folders["eraser"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in toy.CONCEPTS) and "not calibrated" in done.stdout
    values = json.loads(lbdt("concepts", "--eraser", folders["eraser"], "--json").stdout)
    assert values["hookpoint"] == toy.HOOKPOINT
    assert values["concepts"][1] == {
        "concept": "Dogs",
        "latents": [1],
        "thresholds": "published",
        "on": None,
        "off": None,
    }
    assert lbdt("concepts", "--eraser", "/nowhere").exit_code == 1


def test_concepts_of_a_calibrated_eraser(tmp_path):
    import torch

    from lbdt.dictionary import Calibration
    from lbdt.editors import ConceptEraser
    from lbdt.sae import SparseCode

    parts = toy.eraser()
    calibration = Calibration(parts.dictionary, candidates=1)
    for concept in range(3):
        for bin in range(4):
            # Latent i fires with 0.9 on half of concept i's four patches and nowhere else.
            values = torch.tensor([0.9, 0.9, 0.0, 0.0]).view(1, 4, 1)
            indices = torch.full((1, 4, 1), concept)
            calibration.add(concept, bin, SparseCode(values, indices))
    ConceptEraser(parts.sae, calibration.build(), toy.HOOKPOINT).save_pretrained(tmp_path / "e")
    rows = json.loads(lbdt("concepts", "--eraser", str(tmp_path / "e"), "--json").stdout)["concepts"]
    assert [(row["on"], row["off"], row["thresholds"]) for row in rows] == [(0.5, 0.0, "calibrated")] * 3
    assert "50.0%" in lbdt("concepts", "--eraser", str(tmp_path / "e")).stdout


def test_env_names_a_backend_for_every_op():
    values = json.loads(lbdt("env", "--json").stdout)
    assert set(values["ops"]["cpu"]) == {
        *(
            "detect_patches",
            "replace_patches_",
            "encode_topk",
            "patch_uniform",
            "record_patches",
            "erase_step",
        )
    }
    assert values["devices"][-1]["name"] == "cpu" and values["packages"]["torch"]
    assert lbdt("env").stdout.splitlines() == env.lines(env.backends_here())


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (__file__ + "/result.json", "cannot write in " + __file__),
        (str(Path(__file__).parent), "is a folder; give the result's file name"),
        ("/proc/nowhere/result.json", "--out /proc/nowhere/result.json: cannot "),
    ],
    ids=["below-a-file", "a-folder", "no-place-for-files"],
)
def test_bench_refuses_an_unwritable_place_before_it_measures(place, message, monkeypatch):
    from lbdt.bench import runner

    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("measured"))
    done = lbdt("bench", "--quick", "--out", place)
    assert done.exit_code == 1 and message in done.output


def test_bench_prints_its_table_and_writes_the_same_numbers(tmp_path):
    out = tmp_path / "deep" / "result.json"
    quick = "bench --quick --op patch_uniform --rounds 2 --device cpu --threads 1".split()
    done = lbdt(*quick, "--json", "--out", str(out))
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values == json.loads(out.read_text()) and values["benchmark"] == "lbdt bench"
    assert "--op patch_uniform" in values["command"] and "--quick" in values["command"]
    assert values["threads"] == 1 and [row["op"] for row in values["rows"]] == ["patch_uniform"]
    shown = lbdt(*quick).stdout
    assert "patch_uniform" in shown and "x floor" in shown and "written" not in shown


def test_bench_shows_no_time_where_masks_differ(tmp_path, monkeypatch):
    from lbdt.bench import baselines

    monkeypatch.setattr(baselines, "literal", lambda x, **rest: x.new_zeros(x.shape[0], 64, dtype=bool))
    out = tmp_path / "result.json"
    failed = lbdt("bench", "--quick", "--op", "detect_patches", "--share", "10", "--out", str(out))
    assert failed.exit_code == 1 and failed.stdout == "" and not out.exists()
    assert "lbdt: detect_patches, quick, 10%, float32: the masks differ" in failed.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "paint"],
        ["--shape", "sd15-b1", "--quick"],
        ["--dtype", "int8"],
        ["--share", "101"],
        ["--rounds", "1"],
        ["--op", "detect_patches", "--shape", "host"],
    ],
    ids=["op", "shape", "dtype", "share", "rounds", "nothing_to_time"],
)
def test_bench_refuses_bad_usage(arguments):
    assert lbdt("bench", "--device", "cpu", *arguments).exit_code == 2


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from lbdt.cli import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 10  # the machine may be busy; the import list is the real test


def test_version():
    import lbdt as package

    assert lbdt("--version").stdout.strip() == f"lbdt {package.__version__}"


def test_the_middle_panel_is_red_where_patches_were_replaced():
    import torch

    from lbdt.editors.edit_report import StepMask

    detected = torch.zeros(1, 4, 4, dtype=torch.bool)
    detected[0, 0, 0] = True
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    made = picture.compose(grey, [StepMask(5.0, detected, detected)], grey, ("a", "b", "c"))
    across, down = picture.panel_size(64, 64)
    assert (across, down) == (256, 256) and made.size == picture.picture_size(64, 64)
    left, top = picture.GAP * 2 + across, picture.GAP + picture.CAPTION
    # Bottom of the first patch of the first tile, below its label; then a patch that was left.
    red, grey_cell = made.getpixel((left + 2, top + 28)), made.getpixel((left + 100, top + 100))
    assert red[0] > 1.5 * red[1] and max(grey_cell) - min(grey_cell) < 3


def test_large_images_are_shrunk_and_no_mask_is_no_error():
    grey = Image.new("RGB", (1536, 1024))
    made = picture.compose(grey, [], grey, ("a" * 500, "b", "c"))
    assert made.size == picture.picture_size(1536, 1024) and picture.panel_size(1536, 1024) == (768, 512)
