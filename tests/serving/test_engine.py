"""Pictures of different tenants in one call: whose bits depend on whom, what fails whom, what is left behind."""

import asyncio
import warnings

import pytest
import torch

from lbdt import canvas
from lbdt.editors import UnprotectedError, attached
from lbdt.serving import replica
from lbdt.serving.engine import Picture, PictureEngine, PromptTooLongError, Work
from lbdt.serving.front import Served
from lbdt.serving.outcome import Failure
from lbdt.serving.settings import ServeSettings
from tests.repeats import repeats

STEPS = 3
BROKEN = "An image of Sea in Neon style."
NAMES = ("Cats", "Dogs", "Towers", "Sea", "Human")


def prompt(*names):
    return canvas.prompt(list(names), "Sketch")


WORKS = [
    Work(prompt("Cats", "Dogs"), 1, ("Cats",)),
    Work(prompt("Cats", "Dogs"), 1, ("Dogs", "Towers")),
    Work(prompt("Cats", "Dogs"), 1),
    Work(prompt("Towers"), 2**63 - 1, ("Towers",)),
]


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


@pytest.fixture(scope="module")
def eraser():
    return canvas.load_eraser()


@pytest.fixture(scope="module")
def engine(pipe, eraser):
    with PictureEngine(pipe, eraser, batch=4, steps=STEPS, guidance=3.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.generate([work])[0] for work in WORKS]


@pytest.fixture
def broken(pipe):
    """A text encoder that gives NaN for one prompt, as an overflow does."""
    ids = pipe.tokenizer(BROKEN, padding="max_length").input_ids

    def spoil(module, args, kwargs, output):
        given = args[0] if args else kwargs["input_ids"]
        output.last_hidden_state[(given == torch.tensor(ids)).all(1)] = torch.nan
        return output

    handle = pipe.text_encoder.register_forward_hook(spoil, with_kwargs=True)
    yield
    handle.remove()


@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3), (3, 2, 1, 0), (1,), (2, 0), (3, 1, 0)],
    ids=lambda order: "-".join(map(str, order)),
)
def test_a_picture_does_not_depend_on_who_else_is_in_its_batch(engine, alone, order):
    made = engine.generate([WORKS[place] for place in order])
    for picture, place in zip(made, order, strict=True):
        assert repeats(picture.png, alone[place].png)
        assert picture.protected and picture.reason is None
        assert len(picture.detected) == len(picture.replaced) == STEPS
        assert picture.detected == alone[place].detected


def test_tenants_concepts_do_not_mix(alone):
    same_seed = {picture.png for picture in alone[:3]}
    assert len(same_seed) == 3
    assert alone[2].detected == alone[2].replaced == (0,) * STEPS


def test_a_picture_without_concepts_is_the_bare_pipelines(pipe, alone):
    with torch.no_grad():
        rows = [WORKS[2].prompt, "", "", ""]
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 0, 0, 0)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bare = pipe(rows, generator=seeds, num_inference_steps=STEPS, guidance_scale=3.0).images[0]
    from lbdt.serving.engine import png_of

    assert repeats(alone[2].png, png_of(bare))


def test_without_filling_a_call_has_a_row_a_picture(eraser):
    rows, pipe = [], canvas.load_pipeline()
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0].shape[0]), with_kwargs=True
    )
    with PictureEngine(pipe, eraser, batch=4, steps=2, guidance=3.0, fill=False) as engine:
        for count in (1, 3, 1):
            assert all(isinstance(made, Picture) for made in engine.generate(WORKS[:count]))
    assert rows == [2, 2, 6, 6, 2, 2]


@pytest.mark.parametrize("on_failure", ["refuse", "unprotected"])
def test_a_failure_is_that_pictures_alone(engine, alone, broken, on_failure):
    bad = Work(BROKEN, 3, ("Sea",), on_failure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # PIL's casts of NaN
        made = engine.generate([WORKS[0], bad, WORKS[1]])
    assert repeats(made[0].png, alone[0].png) and repeats(made[2].png, alone[1].png)
    if on_failure == "refuse":
        assert isinstance(made[1], UnprotectedError)
    else:
        assert isinstance(made[1], Picture) and not made[1].protected
        assert "NaN or infinite" in made[1].reason
    assert repeats(engine.generate([WORKS[0]])[0].png, alone[0].png)


def test_few_calls_tell_the_one_that_fails_from_the_others(engine, broken):
    calls, call = [], engine.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = engine.generate([Work(BROKEN, 3, ("Sea",)), *WORKS[:3]])
    call.remove()
    assert [isinstance(one, Picture) for one in made] == [False, True, True, True]
    assert len(calls) <= 5 * STEPS  # the batch, its halves, and those of the half with the broken one


def test_what_is_not_looked_for_at_some_timesteps_is_said(pipe, eraser):
    from dataclasses import replace

    class Blind(type(eraser)):
        def select(self, concept):
            selection = super().select(concept)
            if concept != "Cats":
                return selection
            thresholds = selection.thresholds.clone()
            thresholds[5:] = torch.inf
            return replace(selection, thresholds=thresholds)

    blind = Blind(eraser.sae, eraser.dictionary, **eraser.settings)
    with (
        warnings.catch_warnings(),
        PictureEngine(canvas.load_pipeline(), blind, batch=2, steps=STEPS) as engine,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # which says it, too
        seen, unseen = engine.generate(
            [Work(prompt("Dogs"), 1, ("Dogs",)), Work(prompt("Cats"), 1, ("Dogs", "Cats"))]
        )
    assert seen.reason is None
    assert unseen.protected and unseen.reason == "not looked for: Cats at 15 of 20 timesteps"


def test_a_prompt_that_would_be_cut_off_is_refused(engine, alone, caplog, capsys):
    secret = "unspeakable " * 40
    made = engine.generate([WORKS[0], Work(secret, 1)])
    assert repeats(made[0].png, alone[0].png)
    assert isinstance(made[1], PromptTooLongError)
    assert "tokens, and the model reads 24; shorten it" in str(made[1])
    assert "unspeakable" not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("works", "text"),
    [
        ([WORKS[0]] * 5, "at most 4 of one size, got 5"),
        ([WORKS[0], Work("a", 1, size=(256, 256))], "of one size"),
    ],
    ids=["too-many", "two-sizes"],
)
def test_what_is_refused_before_anything_is_made(engine, works, text):
    with pytest.raises(ValueError, match=text):
        engine.generate(works)


def test_an_unknown_concept_is_that_pictures_alone(engine, alone):
    made = engine.generate([WORKS[0], Work("a", 1, ("Cat",), "unprotected")])
    assert repeats(made[0].png, alone[0].png)
    assert isinstance(made[1], ValueError) and "did you mean 'Cats'" in str(made[1])


class Tokenizer:
    """A pipeline's, that fails for one prompt."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __call__(self, prompt, *args, **settings):
        if prompt == BROKEN:
            raise RuntimeError("not a text")
        return self._real(prompt, *args, **settings)


def test_a_tokenizers_failure_is_that_pictures_alone(engine, alone, pipe, monkeypatch):
    monkeypatch.setattr(pipe, "tokenizer", Tokenizer(pipe.tokenizer))
    made = engine.generate([WORKS[0], Work(BROKEN, 1)])
    assert repeats(made[0].png, alone[0].png)
    assert isinstance(made[1], RuntimeError)


def test_a_prompt_is_too_long_where_the_pipeline_reads_less_than_its_tokenizer(engine, monkeypatch):
    real = type(engine.pipe).__call__

    def call(self, *args, max_sequence_length=8, **settings):
        return real(self, *args, **settings)

    monkeypatch.setattr(type(engine.pipe), "__call__", call)
    short, long = engine.generate([Work("a", 1), Work(prompt(*NAMES), 1)])
    assert isinstance(short, Picture)
    assert isinstance(long, PromptTooLongError) and "the model reads 8" in str(long)


def test_an_attachment_that_failed_once_is_made_anew(eraser, monkeypatch):
    with PictureEngine(canvas.load_pipeline(), eraser, batch=4, steps=2, fill=False) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(eraser, "attach", lambda *args, **settings: 1 // 0)
            failed = engine.generate(WORKS[:2])
        assert [type(made) for made in failed] == [ZeroDivisionError, ZeroDivisionError]
        made = engine.generate([WORKS[0]])
    assert isinstance(made[0], Picture) and made[0].protected


@pytest.mark.parametrize("on_failure", ["refuse", "unprotected"])
def test_a_concept_that_cannot_be_detected_is_no_protection(engine, monkeypatch, on_failure):
    real = engine._attachment.set

    def deaf(concepts, **settings):
        if any(concepts):
            raise ValueError("no latent can be detected")
        real(concepts=concepts, **settings)

    monkeypatch.setattr(engine._attachment, "set", deaf)
    (made,) = engine.generate([Work("a", 1, ("Cats",), on_failure)])
    if on_failure == "refuse":
        assert isinstance(made, ValueError)
    else:
        assert isinstance(made, Picture) and not made.protected and made.reason == "ValueError"


@pytest.mark.parametrize("settings", [{"batch": 0}, {"steps": 0}, {"batch": True}], ids=str)
def test_settings_that_no_engine_has(eraser, settings):
    with pytest.raises(ValueError, match="expected 1 or more"):
        PictureEngine(canvas.load_pipeline(), eraser, **settings)


def test_another_size(pipe, eraser, engine):
    made = engine.generate([Work(prompt("Cats"), 1, ("Cats",), size=(64, 64))])
    assert isinstance(made[0], Picture)


def test_closing_takes_the_eraser_off(eraser):
    pipe = canvas.load_pipeline()
    engine = PictureEngine(pipe, eraser, batch=2, steps=2)
    assert len(attached(pipe)) == 1
    engine.close()
    engine.close()
    assert attached(pipe) == ()
    with pytest.raises(ValueError, match="was closed"):
        engine.generate([WORKS[0]])


SERVED = Served("m", "ab" * 32, ("Cats", "Dogs"))


class FailingEngine:
    def __init__(self, made):
        self.made, self.works, self.closed = made, [], False

    def generate(self, works):
        self.works += works
        if isinstance(self.made, Exception):
            raise self.made
        return self.made

    def close(self):
        self.closed = True


@pytest.mark.parametrize("error", [UnprotectedError("NaN"), RuntimeError("no kernel")], ids=lambda e: str(e))
def test_a_replica_that_cannot_make_pictures_does_not_start(monkeypatch, error):
    engine = FailingEngine([error])
    monkeypatch.setattr(replica, "load_engine", lambda settings: (engine, SERVED))
    with pytest.raises(type(error), match=str(error)):
        replica.Replica(None)
    assert engine.works == [Work("", 0, ("Cats",))]


def test_a_replica_whose_steps_protect_nothing_does_not_start(tmp_path):
    settings = ServeSettings(policy=tmp_path / "p", audit=tmp_path / "a", device="cpu", steps=1, batch=1)
    with pytest.raises(UnprotectedError, match="run more steps"):
        replica.Replica(settings)


def test_what_an_engine_raises_does_not_leave_its_replica(monkeypatch):
    engine = FailingEngine([Picture(b"png", True)])
    monkeypatch.setattr(replica, "load_engine", lambda settings: (engine, SERVED))
    made = replica.Replica(ServeSettings(policy="p", audit="a"))
    engine.made = KeyError("a prompt")

    async def scenario():
        outcome = await made.make("acme", WORKS[0], SERVED.eraser)
        await made.close()
        return outcome

    assert asyncio.run(scenario()) == Failure("failed", "KeyError") and engine.closed


def test_a_replica_with_another_eraser_than_the_audit_names_makes_nothing(monkeypatch):
    engine = FailingEngine([Picture(b"png", True)])
    monkeypatch.setattr(replica, "load_engine", lambda settings: (engine, SERVED))
    made = replica.Replica(ServeSettings(policy="p", audit="a"))
    outcome = asyncio.run(made.make("acme", WORKS[0], "cd" * 32))
    assert isinstance(outcome, Failure) and "another eraser" in outcome.reason
    assert len(engine.works) == 1  # the one it was started with
