"""`lbdt convert` on every kind of source, and what it refuses before it writes anything."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lbdt import cli
from lbdt.dictionary import ConceptDictionary
from lbdt.formats.class_params import load_class_params
from lbdt.sae import SparseAutoencoder, unbox
from tests.formats import fixtures

HOOK = "unet.up_blocks.1.attentions.1"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    fixtures.write(folder)
    return folder


def convert(source, out, *more):
    return CliRunner().invoke(cli.app, ["convert", str(source), "--out", str(out), *map(str, more)])


def test_an_sae_with_its_table(root, tmp_path):
    done = convert(root / "sdxl-unbox", tmp_path / "out", "--hookpoint", f"{HOOK}_k3_hidden12/final")
    assert done.exit_code == 0, done.output
    for text in (
        "sdxl-unbox",
        "encoder.weight [12, 6]",
        "assumed",
        "output minus its input",
        "reads back equal",
    ):
        assert text in done.stdout
    sae = SparseAutoencoder.from_pretrained(tmp_path / "out")
    assert sae.config.update and torch.equal(sae.encoder.weight, fixtures.weights()["W_enc"])


@pytest.mark.parametrize(
    ("source", "more", "kind", "update", "activation"),
    [
        (f"saeuron/{HOOK}", (), "saeuron", False, "topk"),
        ("saeuron", ("--hookpoint", HOOK, "--from", "saemnesia"), "saemnesia", False, "topk"),
        (f"saeparate/{HOOK}", (), "saeparate", False, "topk"),
        ("saeparate", ("--hookpoint", HOOK, "--from", "saeparate"), "saeparate", False, "topk"),
        ("gsae", ("--hookpoint", HOOK, "--from", "gsae"), "gsae", False, "topk_sigmoid"),
        ("sparsify", ("--update",), "sparsify", True, "topk"),
        ("steerers", (), "steerers", False, "topk"),
        ("saemnesia", ("--no-update",), "saemnesia", False, "topk"),
    ],
    ids=[
        "saeuron",
        "saemnesia",
        "saeparate",
        "saeparate-named",
        "gsae",
        "sparsify",
        "steerers",
        "saemnesia-hybrid",
    ],
)
def test_the_sae_formats(root, tmp_path, source, more, kind, update, activation):
    done = convert(root / source, tmp_path / "out", "--json", "--encoder-only", "--dtype", "float16", *more)
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert (values["from"], values["to"], values["files"]) == (kind, "lbdt", ["cfg.json", "sae.safetensors"])
    assert values["settings"]["update"] == update and values["settings"]["activation"] == activation
    assert values["checks"]["decoder_rows_zero"] == 0 and len(values["checks"]["decoder_row_norms"]) == 3
    sae = SparseAutoencoder.from_pretrained(tmp_path / "out")
    assert sae.config.update == update and sae.W_dec is None
    assert torch.equal(sae.encoder.weight, fixtures.weights()["W_enc"].half().float())


def test_there_and_back_through_unbox_files(root, tmp_path):
    assert convert(root / "saeuron" / HOOK, tmp_path / "lbdt").exit_code == 0
    done = convert(tmp_path / "lbdt", tmp_path / "unbox", "--to", "sdxl-unbox")
    assert done.exit_code == 0 and "its files cannot say no" in done.stdout
    assert convert(tmp_path / "unbox", tmp_path / "back", "--no-update").exit_code == 0
    for name in ("sae.safetensors",):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "lbdt" / name).read_bytes()
    assert unbox.read_config(tmp_path / "unbox")["n_dirs_local"] == 12


def test_latents_and_the_parameters_beside_them(root, tmp_path):
    done = convert(root / "torch", tmp_path / "out", "--concepts", "Dogs,Cats", "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["files"] == ["dictionary.json", "dictionary.safetensors", "class_params.json"]
    assert values["settings"]["timesteps"] == [801, 601, 401, 201, 1]
    assert any("leading" in note for note in values["assumptions"])
    assert ConceptDictionary.from_pretrained(tmp_path / "out").concepts == ("Dogs", "Cats")
    assert load_class_params(tmp_path / "out")["Cats"].strength == -30


def test_a_latents_file_with_timesteps(root, tmp_path):
    source = root / "protocol2" / f"cls_latents_dict_{HOOK}.pkl"
    done = convert(source, tmp_path / "out", "--timesteps", "999,700,400,100,0", "--dtype", "float16")
    assert done.exit_code == 0 and "timesteps 999, 700, 400, 100, 0" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dictionary.json",
        "dictionary.safetensors",
    ]
    by_hook = convert(root / "protocol4", tmp_path / "b", "--from", "latents", "--hookpoint", HOOK)
    assert by_hook.exit_code == 0, by_hook.output


def test_class_params_alone(root, tmp_path):
    done = convert(root / "torch" / "class_params.pth", tmp_path / "out")
    assert done.exit_code == 0 and "Cats percentile 99.999, multiplier -30.0" in done.stdout
    assert json.loads((tmp_path / "out" / "class_params.json").read_text())["Dogs"] == {
        "percentile": 99.99,
        "multiplier": -15.0,
    }


@pytest.mark.parametrize("suffix", ["pth", "json"])
def test_a_gsaes_parameters_have_an_alpha(tmp_path, suffix):
    path = fixtures.class_params(tmp_path / "class_params.pth", "alpha")
    if suffix == "json":
        assert convert(path, tmp_path / "json").exit_code == 0
        path = tmp_path / "json" / "class_params.json"
    done = convert(path, tmp_path / "out", "--from", "class-params")
    assert done.exit_code == 0 and "Cats percentile 99.999, alpha -30.0" in done.stdout
    assert json.loads((tmp_path / "out" / "class_params.json").read_text())["Dogs"] == {
        "percentile": 99.99,
        "alpha": -15.0,
    }


@pytest.mark.parametrize(
    "more",
    [("--concepts", "Dogs"), ("--hookpoint", HOOK), ("--from", "latents")],
    ids=["by itself", "by hookpoint", "by format"],
)
def test_the_pickle_of_the_style_script_is_found(tmp_path, more):
    fixtures.latents_pickle(tmp_path / "in" / f"style_latents_dict_{HOOK}.pkl", kind="torch")
    done = convert(tmp_path / "in", tmp_path / "out", *more)
    assert done.exit_code == 0, done.output
    assert "Dogs" in ConceptDictionary.from_pretrained(tmp_path / "out").concepts


def test_pickles_of_both_scripts_are_listed(tmp_path):
    names = [f"{kind}_latents_dict_{HOOK}.pkl" for kind in ("cls", "style")]
    for name in names:
        fixtures.latents_pickle(tmp_path / "in" / name)
    for more, advice in (
        ((), "name the file, or give --hookpoint"),
        (("--hookpoint", HOOK), "name the file"),
    ):
        done = convert(tmp_path / "in", tmp_path / "out", *more)
        assert done.exit_code == 1 and f"got {names[0]}, {names[1]}; {advice}\n" in done.stderr
    assert convert(tmp_path / "in" / names[1], tmp_path / "out").exit_code == 0


def test_an_earlier_conversion_is_replaced_only_by_force(root, tmp_path):
    source, out = root / "steerers", tmp_path / "out"
    assert convert(source, out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = convert(source, out)
    assert refused.exit_code == 1 and "--force to replace" in refused.stderr
    assert convert(source, out, "--force", "--dtype", "float16").exit_code == 0
    assert (out / "sae.safetensors").stat().st_size < len(before["sae.safetensors"])
    other = convert(root / "torch" / "class_params.pth", out, "--force")
    assert other.exit_code == 1 and "holds cfg.json, sae.safetensors, which this conversion" in other.stderr


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", (), "no such folder"),
        (".", (), "pass hookpoint=...; subfolders with cfg.json"),
        ("saeuron", ("--hookpoint", "../gsae"), "expected the name of a subfolder"),
        ("saemnesia", (), "does not say whether"),
        ("steerers", ("--timesteps", "leading"), "--timesteps: does not go with an SAE"),
        ("steerers", ("--to", "sdxl-unbox", "--encoder-only"), "--encoder-only: does not go with an SAE"),
        ("gsae", ("--hookpoint", HOOK, "--from", "gsae", "--to", "sdxl-unbox"), "hold a topk SAE"),
        ("torch", ("--update",), "--update: does not go with latents"),
        ("torch", ("--timesteps", "9,x"), "--timesteps: expected leading"),
        ("torch", ("--timesteps", "9,8"), "timesteps: expected 5"),
        ("torch", ("--concepts", "Cats,Birds"), "no class Birds; it has Cats, Dogs, Trees"),
        ("torch", ("--hookpoint", "unet.mid"), "style_latents_dict_unet.mid.pkl, got none; name the"),
        ("torch/class_params.pth", ("--to", "sdxl-unbox"), "--to sdxl-unbox: does not go with class-params"),
        ("damaged", (), "sae.safetensors: not a readable safetensors file"),
    ],
    ids=[
        *("absent", "which", "traversal", "hybrid", "timesteps-of-sae", "no-decoder", "sigmoid-to-unbox"),
        *(
            "update-of-latents",
            "timesteps",
            "few-timesteps",
            "class",
            "hookpoint",
            "params-to-unbox",
            "damaged",
        ),
    ],
)
def test_a_refusal_is_one_line_and_writes_nothing(root, tmp_path, source, more, message):
    damaged = fixtures.saeuron(root / "damaged") / "sae.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = convert(root / source, tmp_path / "out", *more)
    assert done.exit_code == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("lbdt: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [(__file__, "is a file; give a folder"), (__file__ + "/out", "cannot write in"), ("/proc/out", "/proc")],
    ids=["file", "below-a-file", "no-place-for-files"],
)
def test_an_unusable_out(root, out, message):
    done = convert(root / "steerers", out)
    assert done.exit_code == 1 and message in done.stderr


def test_a_failed_conversion_leaves_the_earlier_one(root, tmp_path):
    source = fixtures.saeuron(tmp_path / "sae")
    assert convert(source, tmp_path / "out").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fixtures.saeuron(source, b_dec=torch.full((6,), torch.nan))
    failed = convert(source, tmp_path / "out", "--force")
    assert failed.exit_code == 1 and "b_dec: expected finite values" in failed.stderr
    fixtures.saeuron(source, b_dec=torch.full((6,), 1e9))
    failed = convert(source, tmp_path / "out", "--force", "--dtype", "float16")
    assert failed.exit_code == 1 and "overflow torch.float16" in failed.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_bad_usage_is_exit_code_2(root, tmp_path):
    assert convert(root / "steerers", tmp_path / "out", "--from", "safetensors").exit_code == 2
    assert CliRunner().invoke(cli.app, ["convert", str(root / "steerers")]).exit_code == 2
    assert convert(root / "steerers", tmp_path / "o", "--seed", "3", "--device", "cpu").exit_code == 0
