"""`lbdt.runs.reading`: strict JSON, and files that are no files, on every way into the library."""

import json
import os
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lbdt.activations import Prompt, read_prompts
from lbdt.activations.stored import Stored
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.latents_pickle import read_latents
from lbdt.editors import ConceptEraser, Steering
from lbdt.evaluation.metrics.feature_distances import DirectionJudge, FeatureJudge
from lbdt.evaluation.pictures import read_picture
from lbdt.evaluation.worlds.vit import load_vit
from lbdt.formats.class_params import load_class_params
from lbdt.formats.pickles import read_pickle
from lbdt.formats.pth import read_pth
from lbdt.runs.reading import parse_json, read_bytes, read_json
from lbdt.sae import SparseAutoencoder
from lbdt.training.assignment import load_assignment
from tests.fuzz import inputs

BAD_JSON = {
    "deep arrays": ("[" * 100_000 + "]" * 100_000, "not valid JSON"),
    "deep for what comes after": ("[" * 65 + "]" * 65, "more than 64 levels"),
    "deep objects": ('{"a":' * 65 + "1" + "}" * 65, "more than 64 levels"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' comes twice in an object"),
    "NaN": ('{"a": NaN}', "NaN is no JSON"),
    "infinity": ("[-Infinity]", "-Infinity is no JSON"),
    "a number that overflows": ("[1e999]", "a number that overflows"),
    "65 bits": ("18446744073709551616", "an integer of 20 digits"),
    "5000 digits": ("9" * 5000, "an integer of 5000 digits"),
    "half a surrogate pair": (r'["\ud800"]', "got the lone surrogate"),
    "halves in the wrong order": (r'{"a": "\udc00\ud800"}', "got the lone surrogate"),
    "half a pair in a key": (r'{"a": {"\ud800": 1}}', "got the lone surrogate"),
    "a bare control character": ('["a\x01b"]', "Invalid control character"),
    "two marks": ("\ufeff\ufeff{}", "Expecting value"),
    "more after the end": ("{} {}", "Extra data"),
    "nothing": ("", "Expecting value"),
}


@pytest.mark.parametrize("text, message", BAD_JSON.values(), ids=BAD_JSON)
def test_json_is_refused_by_file_and_by_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="a.json: not valid JSON") as refused:
        read_json(path)
    assert message in str(refused.value) and len(str(refused.value)) < 400
    if text.strip() and "\n" not in text:
        (tmp_path / "a.jsonl").write_text('{"prompt": "a cat"}\n' + text + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match="a.jsonl, line 2: not valid JSON"):
            read_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["SAE of SAeUron", "SAE of sdxl-unbox", "dictionary", "eraser", "steering"])
@pytest.mark.parametrize("case", ["deep arrays", "half a surrogate pair", "NaN", "a key twice"])
def test_every_folder_has_the_one_reader(tmp_path, name, case):
    make, read = inputs.TARGETS[name]
    make(tmp_path)
    path = next(path for path in sorted(tmp_path.rglob("*.json")))
    path.write_text(BAD_JSON[case][0])
    with pytest.raises(ValueError, match=f"{path.name}: not valid JSON"):
        read(tmp_path)


def test_json_that_is_kept():
    escaped = r'["\\ud800", "\ud83d\ude00", "a\u0000"]'
    assert parse_json(escaped, "a") == ["\\ud800", "\N{GRINNING FACE}", "a\0"]
    assert parse_json(b"\xef\xbb\xbf[" + b"[" * 62 + b"]" * 63, "a") != []
    assert parse_json("[18446744073709551615, 1.7e308]", "a") == [2**64 - 1, 1.7e308]


READERS = {
    "prompts.jsonl": read_prompts,
    "prompts.csv": read_prompts,
    "a.json": read_json,
    "latents.pkl": read_pickle,
    "state.pth": read_pth,
    "classifier.pth": load_vit,
    "classifier.safetensors": load_vit,
    "judge.safetensors": FeatureJudge.load,
    "direction.safetensors": DirectionJudge.load,
    "class_params.json": load_class_params,
    "class_params.pth": load_class_params,
    "cfg.json": lambda path: SparseAutoencoder.from_pretrained(path.parent),
    "dictionary.json": lambda path: ConceptDictionary.from_pretrained(path.parent),
    "eraser.json": lambda path: ConceptEraser.from_pretrained(path.parent),
    "steering.json": lambda path: Steering.from_pretrained(path.parent),
    "settings.json": lambda path: Stored(path.parent),
    "assignment.json": lambda path: load_assignment(path.parent),
    "picture.png": read_picture,
}


@pytest.mark.parametrize("kind", ["FIFO", "endless device", "link to a FIFO", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "endless device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a FIFO":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    else:
        path.mkdir()
    start = time.monotonic()
    with pytest.raises(ValueError, match=str(tmp_path)):
        READERS[name](path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_file_too_large_to_be_read_whole_is_refused(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate((1 << 28) + 1)  # a hole, which takes no disk
    with pytest.raises(ValueError, match=rf"{name}: expected at most \d+ bytes"):
        (read_json if name.endswith(".json") else read_prompts)(tmp_path / name)


def test_a_file_without_a_size_is_read_to_its_end():
    """Those of /proc are regular, say that they are empty, and are not."""
    assert read_bytes("/proc/self/status").startswith(b"Name:")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"\n" * 5_000, "line 4001: expected at most 4000 lines"),
        ("a.csv", b"prompt\n" + b"\n" * 5_000, "line 4001: expected at most 4000 lines"),
        ("a.jsonl", b" " * 2_000_000, "line 1: expected at most 1048576 bytes in a line"),
        ("a.csv", b"prompt,prompt\na,b\n", "line 1: expected each column once"),
        ("a.csv", b"prompt\nwell\nb\xed\xa0\x80d\n", "line 3: cannot be read"),
        ("a.jsonl", b'{"prompt": "a", "concept": "b", "concept": "c"}', "line 1: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1e30}', "line 1: seed: expected an integer"),
        (
            "a.jsonl",
            json.dumps({"prompt": "a", "x" * 90: 1} | {str(i): 1 for i in range(999)}).encode(),
            "more",
        ),
    ],
    ids=[
        "lines",
        "csv lines",
        "long line",
        "column twice",
        "surrogate",
        "key twice",
        "seed",
        "columns",
    ],
)
def test_a_prompt_file_is_refused_by_its_line(tmp_path, monkeypatch, name, data, message):
    monkeypatch.setattr("lbdt.runs.reading._MAX_LINES", 4000)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}, line") as refused:
        read_prompts(tmp_path / name)
    assert message in str(refused.value) and len(str(refused.value)) < 800


def test_a_csv_file_of_an_old_macintosh(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,seed\ra cat,1\ra dog,2\r")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.csv")] == ["a cat", "a dog"]


def test_too_many_prompts(tmp_path, monkeypatch):
    from lbdt.activations import prompts

    monkeypatch.setattr(prompts, "MAX_PROMPTS", 2)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 3)
    with pytest.raises(ValueError, match="a.jsonl, line 3: expected at most 2 prompts"):
        read_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": 10**18}, "prompts: expected an integer from 1 to 1000000"),
        ({"prompts": -1}, "prompts: expected an integer from 1"),
        ({"prompts": True}, "prompts: expected an integer from 1"),
        ({"prompts": None}, "prompts: expected an integer from 1 to 1000000, got None"),
        ({"prompts_per_shard": 0}, "prompts_per_shard: expected an integer from 1"),
        ({"prompts_per_shard": 0.5}, "prompts_per_shard: expected an integer from 1"),
        ({"timesteps": []}, "timesteps: expected one or more"),
        ({"timesteps": [1, 1]}, "timesteps: expected each once"),
        ({"timesteps": "991"}, "timesteps: expected a list of int"),
        ({"timesteps": [2**63]}, "timesteps: expected an integer from"),
        ({"dtype": ["float16"]}, "dtype: expected one of float16"),
        ({"dtype": "int8"}, "dtype: expected one of float16"),
        ({"concepts": [1]}, "concepts: expected a list of str"),
        ({"styles": {"Ink": 1}}, "styles: expected a list of str"),
        ({"prompts_sha256": "Z" * 64}, "prompts_sha256: expected 64 hexadecimal digits"),
        ({"sites": []}, "sites: expected a list of one or more objects"),
        ({"sites": [1]}, "sites: expected a list of one or more objects"),
        ({"sites": [{}]}, "sites: site: expected a hookpoint"),
        ({"sites": [{"site": "no dots"}]}, "sites: width: expected an integer"),
        ({"format": 2}, "expected format 1, got 2"),
        ([], "expected format 1, got list"),
    ],
    ids=str,
)
def test_settings_of_activations_are_checked(tmp_path, change, message):
    inputs.make_activations(tmp_path)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match="settings.json: not settings of `lbdt collect`") as refused:
        Stored(tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "key", ["prompts", "prompts_per_shard", "timesteps", "sites", "dtype", "concepts", "styles"]
)
def test_settings_of_activations_that_lack_an_entry(tmp_path, key):
    inputs.make_activations(tmp_path)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    del settings[key]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"settings.json: .*{key}: expected"):
        Stored(tmp_path)


CAST = {
    "SAE of lbdt, jumprelu": ("sae.safetensors", "encoder.weight"),
    "SAE of SAeUron": ("sae.safetensors", "W_dec"),
    "SAE of SAEParate": ("sae.safetensors", "pre_encoder.0.weight"),
    "SAE of sdxl-unbox": ("state_dict.pth", "latent_bias"),
    "dictionary": ("dictionary.safetensors", "mean"),
    "eraser": ("dictionary/dictionary.safetensors", "mean"),
    "classifier.safetensors": ("vit.safetensors", "head.weight"),
    "training.ckpt": ("training.ckpt", "W_dec"),
}


@pytest.mark.parametrize("name", CAST)
@pytest.mark.parametrize("value", [1e300, -1e39])
def test_what_would_become_infinite_in_float32_is_refused(tmp_path, name, value):
    make, read = inputs.TARGETS[name]
    make(tmp_path)
    file, tensor = CAST[name]
    if file.endswith(".pth"):
        state = torch.load(tmp_path / file, weights_only=True)["state_dict"]
    else:
        with safetensors.safe_open(str(tmp_path / file), framework="pt") as opened:
            state, about = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    state[tensor] = state[tensor].double()
    state[tensor].view(-1)[-1] = value
    if file.endswith(".pth"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file, about)
    with pytest.raises(ValueError, match=rf"tensor {tensor}: values up to 1e\+\d+ overflow torch.float32"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("dictionary", "dictionary.json", {"peak": 1e300}, "peak: expected a finite number"),
        ("dictionary", "dictionary.json", {"num_latents": "a\nb"}, "num_latents: expected an integer >= 1"),
        ("dictionary", "dictionary.json", {"bank": 1}, "bank: expected true or false, got 1"),
        ("SAE of lbdt, batch_topk", "cfg.json", {"threshold": 1e300}, "threshold: expected a finite number"),
        ("steering", "steering.json", {"strength": 1e300}, "strength: expected a finite number"),
        ("steering", "steering.json", {"strength": {"Cats": -1e300}}, "strength: expected a finite number"),
        ("SAE of SAeUron", "cfg.json", {"d_in": 2**62}, "expected at most 16777216"),
        (
            "eraser",
            "eraser.json",
            {"selection": {"percentile": "x"}},
            "percentile: expected a number, got 'x'",
        ),
        ("eraser", "eraser.json", {"selection": {"top_k": [1]}}, "top_k: expected an integer"),
    ],
    ids=["peak", "latents", "bank", "threshold", "strength", "strengths", "width", "percentile", "top_k"],
)
def test_a_number_out_of_range_is_refused_by_file(tmp_path, name, file, change, message):
    make, read = inputs.TARGETS[name]
    make(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=file) as refused:
        read(tmp_path)
    assert message in str(refused.value)


def test_latents_that_would_become_infinite_are_refused(tmp_path):
    path = tmp_path / "latents.pkl"
    path.write_bytes(pickle.dumps({"Cats": np.full((2, 3, 4), 1e300)}, 4))
    with pytest.raises(ValueError, match="latents.pkl: Cats: expected finite activations"):
        read_latents(path, progress=False)


@pytest.mark.parametrize("name", ["SAE of SAeUron", "dictionary"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_numbers_that_are_no_floats_of_ours_are_refused(tmp_path, name, dtype):
    make, read = inputs.TARGETS[name]
    make(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="expected numbers of 16 to 64 bits"):
        read(tmp_path)


def test_weights_that_are_integers_are_refused(tmp_path):
    inputs.TARGETS["SAE of SAeUron"][0](tmp_path)
    path = tmp_path / "sae.safetensors"
    save_file({key: tensor.long() for key, tensor in load_file(path).items()}, path)
    with pytest.raises(
        ValueError, match="sae.safetensors: .*expected floating-point numbers, got torch.int64"
    ):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "Cats\udfff"], ids=ascii)
def test_names_and_texts_that_no_file_could_hold_are_refused(text):
    for make in (lambda: Prompt(text), lambda: Prompt("a", text), lambda: Prompt("a", "b", text)):
        with pytest.raises(ValueError, match="got the lone surrogate"):
            make()
    with pytest.raises(ValueError, match="concepts: expected Unicode text, got the lone surrogate"):
        ConceptDictionary((text,), (1,), torch.ones(1, 1, 2), torch.ones(1, 1))


def test_many_names_take_no_time(tmp_path):
    start = time.monotonic()
    (tmp_path / "assignment.json").write_text(
        json.dumps({"concepts": {str(i): i for i in range(50_000)}, "styles": {"a": 1}})
    )
    with pytest.raises(ValueError, match="assignment.json: assignment: latent 1 is given more than once"):
        load_assignment(tmp_path)
    names = [str(i) for i in range(50_000)]
    with pytest.raises(ValueError, match="mean: expected shape"):
        ConceptDictionary(names, (1,), torch.ones(1, 1, 2), torch.ones(1, 1))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"),
        ("PPM", b"P6 1 1 255\n\0\0\0"),
        ("bomb", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)),
        ("empty", b""),
    ],
)
def test_only_png_and_jpeg_of_a_bounded_size_are_pictures(tmp_path, kind, data):
    if kind == "bomb":
        data += struct.pack(">I", zlib.crc32(data[12:])) + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: not a readable picture"):
        read_picture(tmp_path / "a.png")
