"""For each parser of files: a function that writes valid ones into a folder, and one that reads them and asks what a
user of them would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lbdt.activations import Prompt
from lbdt.activations.prompts import prompt_lines, read_prompts
from lbdt.activations.shard_layout import FORMAT, Layout
from lbdt.activations.stored import Stored, read_settings
from lbdt.attack import AttackFolder, AttackOutcome
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.activation_histograms import Histograms
from lbdt.dictionary.latents_pickle import read_latents
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.dictionary.score_state import ScoreState
from lbdt.editors import ConceptEraser, Steering
from lbdt.evaluation.jobs import Job
from lbdt.evaluation.metrics.feature_distances import DirectionJudge, FeatureJudge
from lbdt.evaluation.pictures import read_picture
from lbdt.evaluation.series import Series, SeriesFiles
from lbdt.evaluation.worlds.vit import load_vit
from lbdt.formats.class_params import load_class_params
from lbdt.runs.digests import raw, sha256
from lbdt.runs.files import json_bytes
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training.assignment import Assignment, load_assignment, save_assignment
from lbdt.training.training_checkpoint import read_checkpoint, write_checkpoint
from lbdt.training.training_metrics import MetricsFile
from tests import toy
from tests.evaluation import small
from tests.formats import fixtures

SITE = f"{toy.HOOKPOINT}:output"
PROMPTS = [Prompt("a cat", ("Cats", "Dogs", None)[i % 3], (None, "Ink")[i % 2], i) for i in range(3)]
SETTINGS = {"rows": 8, "data": {"site": SITE}}


def sae(activation: str = "jumprelu", **settings: Any) -> SparseAutoencoder:
    made = SparseAutoencoder(SAEConfig(d_in=4, num_latents=6, k=2, activation=activation, **settings))
    return made.requires_grad_(False)


def read_sae(folder: Path, **options: Any) -> None:
    loaded = SparseAutoencoder.from_pretrained(folder, **options)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in loaded.state_dict().values())


def make_dictionary(folder: Path) -> None:
    concepts, bins, latents, width, bars = 2, 2, 5, 4, 4
    counts = torch.ones(concepts, bins, 2, bars, dtype=torch.int64)
    histograms = Histograms(
        torch.tensor([[[0, 1]] * bins] * concepts), counts, counts, torch.arange(bars + 1.0)
    )
    ConceptDictionary(
        ("Cats", "Dogs"),
        (999, 1),
        torch.rand(concepts, bins, latents, generator=torch.Generator().manual_seed(0)),
        torch.ones(concepts, bins, dtype=torch.int64),
        histograms,
        torch.zeros(bins, 3, width),
        fired=torch.arange(latents),
        assigned={"Cats": 1},
        gate=PictureCounts(counts[..., 0, :], counts[..., 0, :], 16, {"top_k": 1}, 0.005),
    ).save_pretrained(folder)


def read_dictionary(folder: Path) -> None:
    dictionary = ConceptDictionary.from_pretrained(folder)
    for tensor in (dictionary.mean, dictionary.bank):
        assert tensor is None or bool(torch.isfinite(tensor).all())
    assert torch.isfinite(torch.tensor(dictionary.peak))
    if dictionary.gate is not None:
        assert bool((dictionary.gate.least() >= 1).all())
        dictionary.gate.is_for({})


def make_eraser(folder: Path) -> None:
    """As older versions did; with digests, no part that was changed would be looked at."""
    toy.eraser(4, 6).save_pretrained(folder)
    (folder / "digests.json").unlink()


def make_steering(folder: Path) -> None:
    """As `make_eraser`."""
    selection = {"top_k": 1, "Cats": {"percentile": 99.0}}
    made = Steering.from_eraser(toy.eraser(4, 6), strength={"Cats": -1.0}, selection=selection)
    made.save_pretrained(folder)
    (folder / "digests.json").unlink()


def make_activations(folder: Path) -> None:
    entry = {"site": SITE, "width": 4, "patches": 2, "of": 9, "grid": [3, 3]}
    settings = {
        "format": FORMAT,
        "sites": [entry],
        "timesteps": [999, 1],
        "dtype": "float16",
        "concepts": ["Cats", "Dogs"],
        "styles": ["Ink"],
        "prompts": len(PROMPTS),
        "prompts_sha256": sha256(prompt_lines(PROMPTS)),
        "prompts_per_shard": 2,
    }
    (folder / "shards").mkdir()
    (folder / "settings.json").write_bytes(json_bytes(settings))
    (folder / "prompts.jsonl").write_bytes(prompt_lines(PROMPTS))
    layout = Layout(settings, sha256(json_bytes(settings)))
    shards = []
    for index in range(layout.shards):
        parts = [torch.zeros(part.shape, dtype=part.dtype) for part in layout.parts(index).values()]
        data = b"".join(bytes(raw(part)) for part in parts)
        head = layout.header(index, sha256(data))
        layout.path(folder, index).write_bytes(head + data)
        shards.append({"name": f"{index:05d}.safetensors", "bytes": len(head + data), "sha256": sha256(data)})
    manifest = {"format": FORMAT, "settings": layout.digest, "shards": shards}
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


def read_activations(folder: Path) -> None:
    _, layout = read_settings(folder)
    layout.size(0), layout.size(layout.shards - 1)
    stored = Stored(folder)
    stored.labels()
    for site in stored.sites:
        for index in range(2):
            stored.shard(index, site)


def read_activation_settings(folder: Path) -> None:
    """As above, with what the other files say of the settings brought up to date: the settings alone are hostile."""
    settings, layout = read_settings(folder)
    assert layout.shards <= 1_000_000 and len(settings["sites"]) == len(layout.sites)
    assert all(layout.size(index) > 0 for index in (0, layout.shards - 1))


def make_prompts(suffix: str):
    def make(folder: Path) -> None:
        data = prompt_lines(PROMPTS)
        if suffix == ".csv":
            data = b'prompt,concept,style,seed\r\n"a cat, ""asleep""",Cats,,3\r\na dog,Dogs,Ink,\r\n'
        (folder / f"prompts{suffix}").write_bytes(data)

    return make, lambda folder: prompt_lines(read_prompts(folder / f"prompts{suffix}"))


def make_class_params(name: str):
    def make(folder: Path) -> None:
        fixtures.class_params(folder / "class_params.pth")
        if name.endswith(".json"):
            from lbdt.formats.class_params import class_params_json

            (folder / name).write_bytes(class_params_json(load_class_params(folder)))
            (folder / "class_params.pth").unlink()

    return make, load_class_params


def make_latents(protocol: int, kind: str):
    def read(folder: Path) -> None:
        found = read_latents(folder / "latents.pkl", progress=False)
        assert bool(torch.isfinite(found.dictionary.mean).all())

    return lambda folder: fixtures.latents_pickle(folder / "latents.pkl", protocol, kind), read


def make_vit(suffix: str):
    def make(folder: Path) -> None:
        width, patch = 64, 2
        generator = torch.Generator().manual_seed(0)
        from lbdt.evaluation.worlds.vit import _shapes

        shapes = _shapes(classes=2, width=width, depth=1, hidden=4, patch=patch, grid=2)
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if suffix == ".pth":
            torch.save({"model_state_dict": state}, folder / "vit.pth")
        else:
            import safetensors.torch

            safetensors.torch.save_file(state, folder / "vit.safetensors")

    return make, lambda folder: load_vit(folder / f"vit{suffix}", 2)


def trained() -> tuple[SparseAutoencoder, torch.optim.Adam]:
    made = SparseAutoencoder(SAEConfig(d_in=4, num_latents=6, k=2))
    optimizer = torch.optim.Adam(made.parameters())
    sum(parameter.sum() for parameter in made.parameters()).backward()
    optimizer.step()
    return made, optimizer


def make_checkpoint(folder: Path) -> None:
    made, optimizer = trained()
    write_checkpoint(folder / "training.ckpt", SETTINGS, made, optimizer, {"step": torch.tensor([3])})


def read_training_checkpoint(folder: Path) -> None:
    read_checkpoint(folder / "training.ckpt", SETTINGS, sae("topk"), {"step": (1,)})


def make_metrics(folder: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(3)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def state(folder: Path) -> ScoreState:
    return ScoreState(folder, {"first": {"shards": 2, "site": SITE}}, 0, 1, lambda: False)


def make_state(folder: Path) -> None:
    state(folder).save("first", 1, {"sums": torch.ones(2, dtype=torch.float64)})


def files_of(folder: Path) -> SeriesFiles:
    jobs = tuple(Job(prompt, ("Cats",)) for prompt in PROMPTS[:2])
    return SeriesFiles(folder, Series("per", small.kind(), "per", {"padding": 1}, jobs), 2, {"model": "toy"})


def make_series(folder: Path) -> None:
    files = files_of(folder)
    files.prepare()
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    files.write(0, [picture, picture], {"seeds": torch.tensor([0, 1])}, {"pictures": 2, "seconds": 1.0})


def read_series(folder: Path) -> None:
    files = files_of(folder)
    files.prepare()
    files.record(0)
    files.tensors(0, ["seeds"])
    files.pictures(0)


def outcome() -> AttackOutcome:
    texts = {"reference": "Cats", "seen_before": "Dogs", "seen_after": "Cats", "attacked": "x a cat"}
    rest = {
        "timesteps": (1,),
        "losses": (0.5,),
        "checks": 1,
        "prefix": (3,),
        "words": ("x",),
        "typable": True,
    }
    prompt = PROMPTS[0]
    return AttackOutcome(prompt.text, prompt.concept, prompt.style, prompt.seed, **texts, **rest)


def make_attack(folder: Path) -> None:
    AttackFolder(folder / "run", SETTINGS).save(PROMPTS[0], outcome())


def read_attack(folder: Path) -> None:
    found = AttackFolder(folder / "run", SETTINGS).load(PROMPTS[0])
    json_bytes(found.to_dict())


def make_photo(folder: Path) -> None:
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "picture.jpg", "JPEG")


def make_direction(folder: Path) -> None:
    DirectionJudge.fit(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3)).save(
        folder / "direction.safetensors"
    )


def make_judge(folder: Path) -> None:
    FeatureJudge.fit(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).save(
        folder / "judge.safetensors"
    )


TARGETS: dict[str, tuple[Any, Any]] = {
    "SAE of lbdt, jumprelu": (lambda folder: sae().save_pretrained(folder), read_sae),
    "SAE of lbdt, batch_topk": (
        lambda folder: sae("batch_topk", threshold=0.5).save_pretrained(folder, encoder_only=True),
        read_sae,
    ),
    "SAE of SAeUron": (fixtures.saeuron, read_sae),
    "SAE of SAEParate": (fixtures.saeparate, read_sae),
    "SAE of sparsify": (lambda folder: fixtures.saeuron(folder, fixtures.SPARSIFY), read_sae),
    "SAE of sdxl-unbox": (fixtures.unbox, lambda folder: read_sae(folder, format="sdxl-unbox")),
    "dictionary": (make_dictionary, read_dictionary),
    "eraser": (make_eraser, ConceptEraser.from_pretrained),
    "eraser with digests": (
        lambda folder: toy.eraser(4, 6).save_pretrained(folder),
        ConceptEraser.from_pretrained,
    ),
    "steering": (make_steering, Steering.from_pretrained),
    "activations": (make_activations, read_activations),
    "settings of activations": (make_activations, read_activation_settings),
    "prompts, JSON lines": make_prompts(".jsonl"),
    "prompts, CSV": make_prompts(".csv"),
    "class_params.pth": make_class_params("class_params.pth"),
    "class_params.json": make_class_params("class_params.json"),
    "latents of numpy, protocol 4": make_latents(4, "numpy"),
    "latents of numpy, protocol 2": make_latents(2, "numpy"),
    "latents of torch": make_latents(4, "torch"),
    "classifier.pth": make_vit(".pth"),
    "classifier.safetensors": make_vit(".safetensors"),
    "training.ckpt": (make_checkpoint, read_training_checkpoint),
    "metrics.jsonl": (make_metrics, lambda folder: MetricsFile(folder, 3).close()),
    "assignment.json": (
        lambda folder: save_assignment(Assignment({"Cats": 1}, {"Ink": 2}), folder),
        load_assignment,
    ),
    "state of a score": (
        make_state,
        lambda folder: state(folder).load("first", 0, {"sums": (2,)}),
    ),
    "series of pictures": (make_series, read_series),
    "judge of artifacts": (make_judge, lambda folder: FeatureJudge.load(folder / "judge.safetensors")),
    "judge of faults": (make_direction, lambda folder: DirectionJudge.load(folder / "direction.safetensors")),
    "attack": (make_attack, read_attack),
    "picture.jpg": (make_photo, lambda folder: read_picture(folder / "picture.jpg")),
}
