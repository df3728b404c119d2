"""The artifact judge on a tiny Qwen2-VL whose answers are known: they follow from the colour."""

import pytest
import torch
import transformers
from PIL import Image

from lbdt.evaluation.metrics.vlm import QUESTION, ArtifactJudge, parse_answer

# transformers 4 calls so what 5 does not run without torchvision.
PROCESSOR = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
WORDS, COLOURS = ("yes", "no", "maybe"), ("red", "blue", "green")
SPECIAL = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("yes", True),
        ("No", False),
        (" YES.\n", True),
        ("no!", False),
        ("", None),
        ("yes, but few", None),
        ("not", None),
        ("nothing", None),
        ("yesno", None),
        ("no..", None),
        ("Yes. No", None),
    ],
)
def test_only_yes_and_no_are_answers(answer, meaning):
    assert parse_answer(answer) is meaning


def tiny_qwen(folder) -> str:
    """A folder with a Qwen2-VL of width 16 that says "yes" of red pictures, "no" of blue and "maybe" of green ones.

    Its vision tower is random. Its one language layer looks at all tokens alike, of which only a picture's carry
    values: those that tell the three colours apart. A word is followed by the end.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *SPECIAL]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=list(SPECIAL[:4])
    ).save_pretrained(folder)
    of = vocabulary.index
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": of("<|im_start|>"), "eos_token_id": of("<|im_end|>")}
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": rope,
        "rope_scaling": rope,  # its name in transformers 4
        **ends,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=of("<|image_pad|>"),
        vision_start_token_id=of("<|vision_start|>"),
        vision_end_token_id=of("<|vision_end|>"),
        video_token_id=0,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config).eval()
        for parameter in model.model.visual.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    processor = PROCESSOR(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    processor.save_pretrained(folder)
    with torch.no_grad():
        seen = []
        for colour in COLOURS:
            given = processor(images=[picture(colour)], return_tensors="pt")
            tokens = model.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
            tokens = getattr(tokens, "pooler_output", tokens)
            seen.append(tokens[0] / tokens[0].square().mean().sqrt())
        layer = model.model.language_model.layers[0]
        for parameter in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
            parameter.zero_()
        embed, head = model.model.language_model.embed_tokens.weight, model.lm_head.weight
        embed.zero_(), head.zero_()
        layer.self_attn.v_proj.weight[:3] = torch.linalg.pinv(torch.stack(seen, 1))
        for i, word in enumerate(WORDS):
            layer.self_attn.o_proj.weight[i, i] = 1
            head[of(word), i] = 1
            embed[of(word), 3] = 1
        head[of("<|im_end|>"), 3] = 1
    model.save_pretrained(folder)
    return str(folder)


def picture(colour: str, side: int = 32) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def judge(folder):
    return ArtifactJudge.from_pretrained(folder, dtype=torch.float32)


def test_the_answers_are_the_model_s(judge, folder):
    colours = ["red", "blue", "green", "red", "red", "green"]
    answers = tuple(judge.answer(picture(colour)) for colour in colours)
    assert answers == ("yes", "no", "maybe", "yes", "yes", "maybe")
    assert (judge.question, judge.name) == (QUESTION, folder)


def test_pictures_of_any_size_and_mode_are_asked_about(judge):
    assert judge.answer(picture("blue", 90).convert("RGBA").resize((90, 40))) == "no"


def test_the_question_is_the_given_one_in_the_chat_format(folder, judge):
    other = ArtifactJudge(judge.model, judge.tokenizer, judge.processor, folder, question="Is it odd?")
    text = other.tokenizer.decode(other._inputs(picture("red"))["input_ids"][0])
    count = 4 * 4  # 32 pixels, patches of 4, merged two by two
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * count
        + "<|vision_end|>Is it odd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert QUESTION in judge.tokenizer.decode(judge._inputs(picture("red"))["input_ids"][0])


def test_a_tokenizer_of_another_model_is_refused(judge, tmp_path):
    from tests import toy

    other = ArtifactJudge(judge.model, toy._tokenizer(tmp_path), judge.processor, "other")
    with pytest.raises(ValueError, match="expected the tokenizer of Qwen2-VL"):
        other.answer(picture("red"))
