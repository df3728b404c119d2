"""timm's ViT checkpoints under transformers, against timm's forward pass written out under timm's own names."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from lbdt.evaluation.worlds.vit import ViTJudge, load_vit, preprocess
from lbdt.testing import assert_close
from tests.repeats import repeats

WIDTH, DEPTH, PATCH, GRID, HIDDEN = 128, 3, 8, 4, 96
SIDE = PATCH * GRID


def state(classes: int = 5, depth: int = DEPTH, width: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random ViT in timm's names, its norms' weights and biases far from 1 and 0."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, GRID**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linear |= {"mlp.fc1": (HIDDEN, width), "mlp.fc2": (width, HIDDEN)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(v, generator=generator) * v[-1] ** -0.5 for k, v in shapes.items()}
    for name in values:
        if "norm" in name:
            values[name] = values[name] * width**0.5 / 2 + name.endswith("weight")
    return values


def timm_forward(p: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the normed class token, in float64."""
    p, x = {k: v.double() for k, v in p.items()}, x.double()
    width = p["cls_token"].shape[-1]
    norm = lambda x, name: F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, name: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1) + p["pos_embed"]
    for i in range(sum(k.endswith("norm1.bias") for k in p)):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.view(len(x), -1, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"blocks.{i}.attn.proj")
        inner = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(inner, f"blocks.{i}.mlp.fc2")
    token = norm(x, "norm")[:, 0]
    return linear(token, "head"), token


def pictures(count: int = 3, side: int = SIDE) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


def write(path, values, form):
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(values, path)
    else:
        torch.save({"model_state_dict": values, "epoch": 3} if form == "checkpoint" else values, path)
    return path


@pytest.mark.parametrize("form", ["checkpoint", "bare", "safetensors", "half"])
def test_computes_what_timm_computes(tmp_path, form):
    values = state()
    if form == "half":
        values = {name: tensor.half() for name, tensor in values.items()}
    vit = load_vit(write(tmp_path / "vit.pth", values, form), classes=5)
    logits, token = vit(pictures())
    expected, expected_token = timm_forward(values, preprocess(pictures(), SIDE))
    assert_close(logits, expected.float(), "encode_topk")
    assert_close(token, expected_token.float(), "encode_topk")
    assert (vit.classes, vit.side) == (5, SIDE)


def test_a_file_of_as_many_tensors_as_vit_large_is_read(tmp_path):
    values = state(depth=24, width=64)
    path = write(tmp_path / "large.pth", values, "checkpoint")
    assert len(values) == 296
    expected = timm_forward(values, preprocess(pictures(1), SIDE))[0]
    assert_close(load_vit(path)(pictures(1))[0], expected.float(), "encode_topk")


def test_no_pictures_give_no_rows(tmp_path):
    logits, token = load_vit(write(tmp_path / "vit.pth", state(), "bare"))([])
    assert logits.shape == (0, 5) and token.shape == (0, WIDTH)


def _dropped(name):
    return lambda s: s.pop(name)


def _with(name, value):
    return lambda s: s.update({name: value})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(_dropped("blocks.1.norm2.bias"), r"missing tensor blocks\.1\.norm2\.bias", id="missing"),
        pytest.param(_dropped("head.weight"), r"head\.weight of 2 dimensions", id="no-head"),
        pytest.param(_with("fc_norm.weight", torch.ones(4)), r"unknown tensor fc_norm\.weight", id="unknown"),
        pytest.param(_with("norm.bias", torch.zeros(7)), r"norm\.bias: expected shape \[128\]", id="shape"),
        pytest.param(_with("norm.bias", torch.full((WIDTH,), torch.nan)), r"norm\.bias: .*NaN", id="nan"),
        pytest.param(_with("pos_embed", torch.zeros(1, 4, WIDTH)), "square number of patches", id="grid"),
        pytest.param(_with("head.bias", torch.zeros(5, dtype=torch.int64)), "floating-point", id="integers"),
    ],
)
def test_refuses_what_is_not_that_model(tmp_path, damage, words):
    values = state()
    damage(values)
    for form in ("checkpoint", "safetensors"):
        path = write(tmp_path / "vit.pth", values, form)
        with pytest.raises(ValueError, match=words) as error:
            load_vit(path)
        assert str(path) in str(error.value)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_refuses_other_classes_other_contents_and_pickles_with_code(tmp_path, capsys):
    path = write(tmp_path / "vit.pth", state(), "checkpoint")
    with pytest.raises(ValueError, match="expected a classifier of 51 classes, got 5"):
        load_vit(path, classes=51)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected timm's tensors by name.*got list"):
        load_vit(tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no such file"):
        load_vit(tmp_path / "absent.pth")
    values = {f"t{i}": torch.zeros(1) for i in range(300)}
    torch.save(values | {"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="print"):
        load_vit(tmp_path / "evil.pth")
    torch.save(values, tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb,
    ):
        for name in good.namelist():
            bomb.writestr(name, good.read(name) + bytes(1 << 16))
    with pytest.raises(ValueError, match="bomb.pth: .*could fill the memory"):
        load_vit(tmp_path / "bomb.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="old.pth"):
        load_vit(tmp_path / "old.pth")
    assert "ran" not in capsys.readouterr().out


def test_preprocessing_scales_to_plus_minus_one_and_resizes_as_torchvision_does():
    (picture,) = pictures(1, 224)
    exact = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 127.5 - 1
    assert_close(preprocess([picture])[0], exact.float(), "encode_topk")
    # A horizontal step at half the width, shrunk by two: PIL's filter is antialiased, triangular and 2 pixels wide, so
    # the columns beside the step take 1/8 of the other side.
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 240
    row = preprocess([Image.fromarray(step)], 4)[0, 0, 0]
    assert ((row + 1) * 127.5).tolist() == pytest.approx([0, 30, 210, 240])
    grey = Image.new("L", (10, 6), 51)
    assert preprocess([grey], 4).flatten().unique().tolist() == pytest.approx([51 / 127.5 - 1])


def test_the_judge_answers_with_both_classifiers_and_swaps_them_for_styles(tmp_path):
    things = load_vit(write(tmp_path / "things.pth", state(4, seed=1), "bare"))
    given, values = pictures(12), state(6, seed=2)
    # No class is everyone's: the mean logits are 0.
    values["head.bias"] -= timm_forward(values, preprocess(given, SIDE))[0].mean(0).float()
    themes = load_vit(write(tmp_path / "themes.pth", values, "bare"))
    first = things(given)[0].argmax(-1)
    second, token = themes(given)[0].argmax(-1), themes(given)[1]
    judge = ViTJudge(things, themes)
    verdicts = judge(given)
    assert verdicts.objects.dtype == torch.bool and judge.single_label
    assert torch.equal(verdicts.objects, torch.eye(4).bool()[first]) and torch.equal(verdicts.styles, second)
    assert repeats(verdicts.features, token)
    seen = second.unique().tolist()
    assert len(seen) > 1
    judge = ViTJudge(things, themes, swapped={theme: 10 + theme for theme in seen[1:]})
    verdicts = judge(given)
    assert torch.equal(verdicts.styles, first)
    found = [row.nonzero().flatten().tolist() for row in verdicts.objects]
    assert found == [[10 + t] if t in seen[1:] else [] for t in second.tolist()]
    assert "things.pth" in judge.features_name and "themes.pth" in judge.name
    assert judge.name != ViTJudge(things, themes).name, "the same numbers mean other classes"
    other = load_vit(write(tmp_path / "themes.pth", state(6, seed=3), "bare"))
    assert other.name != themes.name, "another checkpoint of the same file name"
