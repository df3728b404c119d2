"""CLIP scores of a tiny random CLIP against the formula and against torchmetrics."""

import numpy as np
import pytest
import torch
from PIL import Image

from lbdt.evaluation.metrics.clip import Clip, clip_scores
from lbdt.testing import assert_close
from tests import toy


def tiny_clip(folder) -> str:
    """A folder with a CLIP of width 16 that reads toy's letters and pictures of 16 x 16; 24 tokens at most."""
    import transformers
    from transformers import CLIPConfig, CLIPModel

    tokenizer = toy._tokenizer(folder / "words")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        torch.manual_seed(2)  # some cosines negative, some not
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    size = {"shortest_edge": 16}
    # transformers 4 calls so what 5 does not run without torchvision.
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor(size=size, crop_size=16).save_pretrained(folder / "clip")
    return str(folder / "clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.from_pretrained(folder)


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(1).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(values) for values in noise]


PROMPTS = ["a cat", "ab ab", "a dog in red", "z", "q w e"]


def test_scores_are_a_hundred_times_the_positive_cosine(clip):
    # Without padding, a row at a time, straight from the model's two towers.
    model, expected = clip.model, []
    for picture, prompt in zip(pictures(5), PROMPTS, strict=True):
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = torch.tensor(clip.processor.image_mean), torch.tensor(clip.processor.image_std)
        pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        ids = clip.tokenizer(prompt, return_tensors="pt")["input_ids"]
        read = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        cosine = (seen * read).sum() / (seen.norm() * read.norm())
        expected.append(100 * max(cosine.item(), 0.0))
    result = clip_scores(clip, pictures(5), PROMPTS)
    assert_close(result, torch.tensor(expected), "encode_topk")
    assert min(expected) == 0 < max(expected), "the clamp is tried"


def test_agrees_with_torchmetrics_picture_by_picture(clip):
    from torchmetrics.functional.multimodal import clip_score as theirs

    class Model(torch.nn.Module):
        """torchmetrics wants tensors, transformers 5 returns whole outputs; a callable keeps it off the network."""

        config = clip.model.config

        def get_image_features(self, pixels):
            return getattr((out := clip.model.get_image_features(pixels)), "pooler_output", out)

        def get_text_features(self, ids, mask):
            return getattr((out := clip.model.get_text_features(ids, mask)), "pooler_output", out)

    def processor(text=None, images=None, **settings):
        if text is not None:
            return clip.tokenizer(text, **settings)
        return clip.processor(
            images=[Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt"
        )

    expected = []
    for picture, prompt in zip(pictures(5), PROMPTS, strict=True):
        tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        expected.append(theirs(tensor, prompt, lambda: (Model(), processor)).clamp(min=0))
    result = clip_scores(clip, pictures(5), PROMPTS)
    assert_close(result, torch.stack(expected).detach(), "encode_topk")


def test_a_picture_that_matches_its_text_scores_a_hundred(clip, monkeypatch):
    monkeypatch.setattr(clip, "pictures", lambda given: clip.texts(["a cat", "z"]))
    result = clip_scores(clip, [None, None], ["a cat", "z"])
    assert result.tolist() == pytest.approx([100, 100])
    assert result.max() <= 100
    monkeypatch.setattr(clip, "pictures", lambda given: -clip.texts(["a cat", "z"]))
    assert clip_scores(clip, [None, None], ["a cat", "z"]).tolist() == [0, 0]


def test_the_ends_of_long_prompts_are_not_read(clip):
    long = " ".join("abcdefghijklmnopqrstuvwxyz")
    result = clip_scores(clip, pictures(2), [long, "a cat"])
    again = clip_scores(clip, pictures(2), [long + " z z z", "a cat"])
    assert_close(result, again, "encode_topk")


@pytest.mark.parametrize(
    ("count", "prompts"),
    [pytest.param(0, [], id="none"), pytest.param(2, ["a"], id="one-prompt-for-two-pictures")],
)
def test_refuses_what_cannot_be_paired(clip, count, prompts):
    with pytest.raises(ValueError, match=f"got {len(prompts)} and {count} pictures"):
        clip_scores(clip, pictures(count), prompts)


def test_pickled_weights_are_not_read(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save(Clip.from_pretrained(folder).model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(OSError):
        Clip.from_pretrained(copy)
