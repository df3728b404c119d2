"""The loss, its timesteps, and the search on a tiny pipeline."""

import dataclasses
import json

import pytest
import torch

from lbdt.activations.prompts import Prompt
from lbdt.attack import AttackFolder, AttackOutcome, AttackSettings, Prefix, PrefixSearch, summarise
from lbdt.attack.loss import ReferenceLoss, frozen, latent_of, spread
from lbdt.attack.prefixed_text import PrefixedText
from lbdt.editors import Steering
from tests import toy
from tests.attack.judges import drawing_lots
from tests.repeats import repeats

PROMPT = Prompt("a cat", "Cats", None, 7)
SHORT = AttackSettings(tokens=2, iterations=3, timesteps=4, steps=2, guidance=4.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(shared):
    """The shared pipeline, which every test must leave as it was."""
    asked = [p.requires_grad for p in shared.unet.parameters()]
    yield shared
    assert toy.traces(shared) == [] and [p.requires_grad for p in shared.unet.parameters()] == asked
    assert all(p.grad is None for p in shared.unet.parameters())


class Script:
    """Judges by a list of answers, the last of which is repeated."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.pictures = list(answers), []

    def __call__(self, pictures):
        self.pictures += pictures
        return [self.answers[min(len(self.pictures), len(self.answers)) - 1]] * len(pictures)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_diffusers_own_noising_and_velocity(pipe, kind):
    from diffusers import DDPMScheduler

    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    embedding = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    before = pipe.scheduler
    pipe.scheduler = scheduler = DDPMScheduler(prediction_type=kind)
    try:
        loss = ReferenceLoss(pipe, latent)
        got = loss(embedding, 430, torch.Generator().manual_seed(3)).detach()
    finally:
        pipe.scheduler = before
    noise, when = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3)), torch.tensor([430])
    target = {"epsilon": noise, "sample": latent, "v_prediction": scheduler.get_velocity(latent, noise, when)}
    with torch.no_grad():
        predicted = pipe.unet(scheduler.add_noise(latent, noise, when), when, embedding).sample
    wanted = (predicted - target[kind]).square().mean()
    assert float(got) == pytest.approx(float(wanted)) and loss.timesteps == 1000


def test_a_model_that_predicts_the_noise_has_no_loss(pipe, monkeypatch):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    loss = ReferenceLoss(pipe, torch.zeros(1, 4, 8, 8))
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *args, **kwargs: (noise,))
    embedding = torch.zeros(1, 16, 16)
    assert float(loss(embedding, 500, torch.Generator().manual_seed(3))) == 0
    assert float(loss(embedding, 500, torch.Generator().manual_seed(4))) > 1


def test_an_unknown_prediction_is_refused(pipe):
    from diffusers import DDIMScheduler

    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler()
    pipe.scheduler.register_to_config(prediction_type="flow")
    try:
        with pytest.raises(ValueError, match="epsilon or v_prediction or sample, got 'flow'"):
            ReferenceLoss(pipe, torch.zeros(1, 4, 8, 8))
    finally:
        pipe.scheduler = before


def test_the_latent_is_the_vae_s_in_the_unet_s_scale(pipe):
    picture = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    latent = latent_of(pipe, picture)
    pixels = pipe.image_processor.preprocess(picture)
    with torch.no_grad():
        wanted = pipe.vae.encode(pixels).latents * pipe.vae.config.scaling_factor
    assert latent.shape == (1, 4, 8, 8) and repeats(latent, wanted)


def test_the_published_timesteps():
    assert spread(50, 1000) == list(range(10, 1000, 20))
    assert spread(1, 1000) == [500] and spread(4, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="timesteps: expected 1 to 1000 of them, got 1001"):
        spread(1001, 1000)


def test_parameters_ask_for_gradients_again_after_a_failure(pipe):
    with pytest.raises(KeyError), frozen(pipe):
        assert not any(p.requires_grad for p in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()])
        raise KeyError
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_an_eraser_that_never_fires_has_failed_without_an_attack(pipe):
    generator = torch.Generator().manual_seed(PROMPT.seed)
    base = pipe("a cat", num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]

    def judge(pictures):
        return ["Cats" if repeats(picture, base) else "Dogs" for picture in pictures]

    told = []
    never = PrefixSearch(pipe, toy.eraser(threshold=1e9), judge, SHORT).run(PROMPT, told.append)
    assert (never.seen_before, never.seen_after, never.timesteps, never.checks) == ("Cats", "Cats", (), 0)
    assert never.attacked == "a cat" and never.prefix == () and not never.erased_before and sum(told) == 4
    fires = PrefixSearch(pipe, toy.eraser(padding=0, threshold=0.1), judge, SHORT).run(PROMPT)
    assert fires.seen_before == "Dogs" and fires.timesteps == (125, 375, 625, 875) and fires.erased_after


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_stops_at_the_first_success_and_counts_what_it_did(pipe, every):
    settings = AttackSettings(tokens=2, iterations=2, timesteps=5, check_every=every, steps=1)
    told = []
    # The reference, the erased picture, then the checks: the second one succeeds.
    judge = Script("Cats", "Dogs", "Trees", "Cats")
    outcome = PrefixSearch(pipe, toy.eraser(), judge, settings).run(PROMPT, told.append)
    done = min(2 * every, 5)
    assert len(outcome.timesteps) == len(outcome.losses) == done and outcome.checks == 2
    assert (outcome.reference, outcome.seen_before, outcome.seen_after) == ("Cats", "Dogs", "Cats")
    assert outcome.erased_before and not outcome.erased_after and sum(told) == 5
    assert len(outcome.prefix) == 2 and len(judge.pictures) == 4


def erased(pipe, eraser, **prompt):
    """The picture of SHORT's sampling, with the concept erased."""
    with eraser.attach(pipe, ["Cats"], seed=PROMPT.seed):
        generator = torch.Generator().manual_seed(PROMPT.seed)
        return pipe(**prompt, num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]


@pytest.mark.parametrize("position", ["prefix", "suffix", "middle"])
@pytest.mark.parametrize("search", ["gradient", "random"])
def test_what_can_be_typed_is_judged(pipe, position, search):
    judge, eraser = Script("Dogs"), toy.eraser()
    settings = dataclasses.replace(SHORT, position=position, search=search)
    outcome = PrefixSearch(pipe, eraser, judge, settings).run(PROMPT)
    assert settings.judged == "typed" and outcome.attacked != PROMPT.text
    assert repeats(erased(pipe, eraser, prompt=outcome.attacked), judge.pictures[-1])


def test_the_text_is_judged_though_it_has_other_tokens(pipe, monkeypatch):
    """ "a" and "b</w>" are typed "ab", which is one token."""
    eraser = toy.eraser()
    probe = PrefixedText(pipe, PROMPT.text, 2)
    pair = [probe.vocabulary.tolist().index(i) for i in pipe.tokenizer.convert_tokens_to_ids(["a", "b</w>"])]
    monkeypatch.setattr(Prefix, "best", lambda self: torch.tensor(pair))
    pictures = {}
    for judged in ("typed", "ids"):
        judge = Script("Dogs")
        outcome = PrefixSearch(pipe, eraser, judge, dataclasses.replace(SHORT, judged=judged)).run(PROMPT)
        assert (outcome.attacked, outcome.typable) == ("ab a cat", False)
        pictures[judged] = judge.pictures[-1]
    assert repeats(pictures["typed"], erased(pipe, eraser, prompt="ab a cat"))
    assert repeats(pictures["ids"], erased(pipe, eraser, prompt_embeds=probe.embed(torch.tensor(pair))))
    assert not repeats(pictures["typed"], pictures["ids"])


def test_the_judged_picture_of_ids_is_that_of_the_reported_ids_through_the_eraser(pipe):
    judge, eraser = Script("Dogs"), toy.eraser()
    outcome = PrefixSearch(pipe, eraser, judge, dataclasses.replace(SHORT, judged="ids")).run(PROMPT)
    ids = pipe.tokenizer("a cat").input_ids
    row = [ids[0], *outcome.prefix, *ids[1:]]
    with torch.no_grad():
        padded = torch.tensor([row + [ids[-1]] * (16 - len(row))])
        embedding = pipe.text_encoder(padded)[0]
    again = erased(pipe, eraser, prompt_embeds=embedding)
    assert repeats(again, judge.pictures[-1]) and not repeats(again, judge.pictures[1])
    assert list(outcome.words) == pipe.tokenizer.convert_ids_to_tokens(list(outcome.prefix))


@pytest.mark.parametrize(
    "make",
    [toy.eraser, lambda: Steering.from_eraser(toy.eraser(k=8), strength=-2.0)],
    ids=["per", "steering"],
)
def test_the_same_outcome_again_whatever_was_attacked_before(pipe, make):
    others = [Prompt("a dog", "Dogs", None, 8), Prompt("a tree", "Trees", None, 9)]
    first = [PrefixSearch(pipe, make(), drawing_lots, SHORT).run(p) for p in [PROMPT, *others]]
    torch.manual_seed(99)
    again = PrefixSearch(pipe, make(), drawing_lots, SHORT)
    assert repeats([again.run(p) for p in [*others[::-1], PROMPT]], first[::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": Prompt("a cat")}, "has no concept to erase"),
        ({"prompt": Prompt("a cat", "Birds")}, "Birds"),
        ({"prompt": Prompt("a very long story", "Cats")}, "are more than the text encoder's 16"),
        ({"settings": AttackSettings(timesteps=1001)}, "expected 1 to 1000"),
        (
            {"eraser": Steering.from_eraser(toy.eraser(k=8), strength=-1.0, error="released")},
            "has no gradient",
        ),
    ],
    ids=["no-concept", "unknown", "long", "timesteps", "released"],
)
def test_refusals(pipe, change, message):
    settings, eraser = change.get("settings", SHORT), change.get("eraser", toy.eraser())
    with pytest.raises((ValueError, KeyError), match=message):
        PrefixSearch(pipe, eraser, Script("Cats"), settings).run(change.get("prompt", PROMPT))


@pytest.mark.parametrize("name", ["tokens", "iterations", "timesteps", "check_every", "steps"])
def test_settings_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got 0"):
        AttackSettings(**{name: 0})


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("search", "gradient or random"),
        ("position", "prefix or suffix or middle"),
        ("judged", "typed or ids"),
    ],
)
def test_settings_of_another_name_are_refused(name, known):
    with pytest.raises(ValueError, match=f"{name}: expected {known}, got 'luck'"):
        AttackSettings(**{name: "luck"})


def test_the_control_draws_its_prefixes_and_judges_as_often(pipe):
    settings = AttackSettings(tokens=3, iterations=1, timesteps=6, check_every=2, steps=1, search="random")
    judge = Script("Dogs")
    first, again = (PrefixSearch(pipe, toy.eraser(), judge, settings).run(PROMPT) for _ in range(2))
    assert first == again and first.losses == () and first.checks == 3 and len(first.timesteps) == 6
    other = PrefixSearch(pipe, toy.eraser(), judge, settings).run(Prompt("a cat", "Cats", None, 8))
    assert len(first.prefix) == 3 and first.prefix != other.prefix


def outcome(before: str, after: str, concept: str = "Cats") -> AttackOutcome:
    return AttackOutcome(
        "a", concept, None, 0, "Cats", before, after, (1,), (0.5,), 1, (3,), ("a</w>",), "a a", True
    )


def test_ua_before_and_after_are_divided_by_the_pairs_that_ran():
    rows = [("Cats", "Cats"), ("Dogs", "Cats"), ("Dogs", "Dogs"), ("Dogs", "Trees"), ("Trees", "Cats")]
    total = summarise(outcome(*row) for row in rows)
    assert (total.pairs, total.before, total.after, total.effectiveness) == (5, 80.0, 40.0, 40.0)
    assert total.broken == 2 and summarise([]) is None


def test_a_folder_keeps_outcomes_and_refuses_others(tmp_path):
    folder = AttackFolder(tmp_path / "a", {"seed": 0, "attack": {"tokens": 5}})
    kept = outcome("Dogs", "Cats")
    prompt = Prompt(kept.prompt, kept.concept, None, kept.seed)
    assert folder.load(prompt) is None
    folder.save(prompt, kept)
    again = AttackFolder(tmp_path / "a", {"seed": 0, "attack": {"tokens": 5}})
    assert again.load(prompt) == kept and again.load(Prompt("a", "Cats", None, 1)) is None
    with pytest.raises(ValueError, match="attack.tokens: 5 there, 6 here"):
        AttackFolder(tmp_path / "a", {"seed": 0, "attack": {"tokens": 6}})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no attack.json"):
        AttackFolder(tmp_path / "b", {})
    (path,) = (tmp_path / "a" / "pairs").iterdir()
    for damage in ("{", json.dumps({"prompt": "a"}), path.read_text().replace('"seed": 0', '"seed": "0"')):
        path.write_text(damage)
        with pytest.raises(ValueError, match=f"{path.name}.*delete it to attack that pair again"):
            again.load(prompt)
