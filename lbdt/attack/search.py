"""The search: one prompt, one eraser, and prefixes until the concept is back or the timesteps are through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbdt.activations.capture import quiet
from lbdt.attack.loss import ReferenceLoss, frozen, latent_of, spread
from lbdt.attack.outcomes import AttackOutcome
from lbdt.attack.prefix import Prefix
from lbdt.attack.prefixed_text import POSITIONS, PrefixedText, check_pipeline
from lbdt.runs.digests import sha256

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.activations.prompts import Prompt
    from lbdt.editors import UnetEditor

SEARCHES = ("gradient", "random")
JUDGED = ("typed", "ids")

# Start seeds of the reference pictures, so that none is the attacked picture.
_REFERENCE = 1_000_003


@dataclass(frozen=True)
class AttackSettings:
    """Settings of the attack; the defaults are the published ones (METHOD.md, 8.7), but for the sampling."""

    tokens: int = 5
    """Length of the prefix."""
    iterations: int = 40
    """Steps of the optimiser at each timestep."""
    timesteps: int = 50
    """Places on the noise schedule, from the cleanest to the noisiest (`lbdt.attack.loss.spread`)."""
    check_every: int = 1
    """Timesteps between two checks of success; the last one is always checked."""
    search: str = "gradient"
    """"gradient": the attack. "random": its control, a prefix drawn evenly from the vocabulary for each check."""
    lr: float = 0.01
    weight_decay: float = 0.1
    position: str = "prefix"
    """Where the tokens are, one of `lbdt.attack.prefixed_text.POSITIONS`."""
    judged: str = "typed"
    """What success is judged by. "typed", as published: the picture of the attacked prompt's text, which may have other
    tokens. "ids": that of the tokens, which nobody may be able to type."""
    steps: int = 20
    """Denoising steps of the pictures that are judged."""
    guidance: float | None = None
    """Guidance scale of those pictures; None: the pipeline's own."""

    def __post_init__(self) -> None:
        for name in ("tokens", "iterations", "timesteps", "check_every", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        for name, known in (("search", SEARCHES), ("position", POSITIONS), ("judged", JUDGED)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {value!r}")


class PrefixSearch:
    """UnlearnDiffAtk (Zhang et al., arXiv 2310.11868; METHOD.md, 8.7), mode text_grad, through an attached eraser.

    First the prompt as it is: where the judge sees the concept, the eraser has failed without an attack. Else the
    timesteps one after another, each with some iterations of one optimiser, and after each (see `check_every`) a
    picture by the likeliest tokens (`AttackSettings.judged`), from the prompt's own seed; the first that shows the
    concept ends the search.

    Unlike the published script: the reference picture is the pipeline's own, without the eraser and from another
    seed, as not every world has a data set; special tokens are no part of a prefix (`PrefixedText`); and UNets that
    predict something else than the noise have that as their target (`ReferenceLoss`).
    """

    def __init__(
        self,
        pipe: Any,
        eraser: UnetEditor,
        judge: Callable[[Sequence[Image.Image]], Sequence[str]],
        settings: AttackSettings | None = None,
    ) -> None:
        """
        Args:
            pipe: a diffusers pipeline of Stable Diffusion's kind with one CLIP text encoder. Its weights are not
                touched.
            eraser: a `ConceptEraser` or a `Steering`.
            judge: the concept that each picture shows, by the name that the prompts' labels have.
            settings: None: the published ones.

        Raises:
            TypeError, ValueError: another kind of pipeline, a count of timesteps that its schedule has not, a steering
                that has no gradient.
        """
        check_pipeline(pipe)
        self.pipe, self.eraser, self.judge = pipe, eraser, judge
        self.settings = settings or AttackSettings()
        self.timesteps = spread(self.settings.timesteps, len(pipe.scheduler.alphas_cumprod))
        if not eraser.has_gradient:
            raise ValueError(
                "eraser: steering with error 'released' decodes the top-k code, which has no gradient; attack it with "
                "error='corrected'"
            )

    def run(self, prompt: Prompt, progress: Callable[[int], None] = lambda done: None) -> AttackOutcome:
        """Attacks one prompt with a concept. `progress` is told of timesteps done or spared, all in all
        `settings.timesteps`.

        Every draw comes from the prompt's seed and text, so prompts may be attacked in any order and by any process.

        Raises:
            ValueError: a prompt without a concept, or too long; a concept that the eraser does not know.
        """
        if prompt.concept is None:
            raise ValueError(f"prompt: {prompt.text!r} has no concept to erase")
        text = PrefixedText(self.pipe, prompt.text, self.settings.tokens, self.settings.position)
        undo = quiet(self.pipe)
        try:
            picture = self._picture(prompt.seed + _REFERENCE, prompt=prompt.text)
            # The loss calls the denoiser itself, with rows of the prompt alone.
            attached = self.eraser.attach(self.pipe, [prompt.concept], seed=prompt.seed, layout=("cond",))
            with attached, frozen(self.pipe):
                return self._attack(prompt, text, picture, progress)
        finally:
            undo()

    def _attack(
        self, prompt: Prompt, text: PrefixedText, picture: Any, progress: Callable[[int], None]
    ) -> AttackOutcome:
        settings, left = self.settings, len(self.timesteps)
        reference = self._seen(picture)
        before = after = self._seen(self._picture(prompt.seed, prompt=prompt.text))
        done: list[int] = []
        losses: list[float] = []
        checks, chosen = 0, None
        if before != prompt.concept:
            loss_at = ReferenceLoss(self.pipe, latent_of(self.pipe, picture))
            generator = torch.Generator().manual_seed(_number(prompt))
            prefix = Prefix(
                settings.tokens,
                len(text.vocabulary),
                generator,
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                device=text.vocabulary.device,
            )
            for timestep in self.timesteps:
                if settings.search == "gradient":
                    losses.append(self._descend(prefix, text, loss_at, timestep, generator))
                done.append(timestep)
                progress(1)
                left -= 1
                if len(done) % settings.check_every and left:
                    continue
                chosen, checks = self._chosen(prefix, generator), checks + 1
                after = self._seen(self._picture(prompt.seed, **self._attacked(text, chosen)))
                if after == prompt.concept:
                    break
        progress(left)
        attacked, typable = (prompt.text, True) if chosen is None else text.text(chosen)
        return AttackOutcome(
            prompt.text,
            prompt.concept,
            prompt.style,
            prompt.seed,
            reference,
            before,
            after,
            tuple(done),
            tuple(losses),
            checks,
            () if chosen is None else tuple(text.vocabulary[chosen].tolist()),
            () if chosen is None else tuple(text.words(chosen)),
            attacked,
            typable,
        )

    def _descend(
        self,
        prefix: Prefix,
        text: PrefixedText,
        loss_at: ReferenceLoss,
        timestep: int,
        generator: torch.Generator,
    ) -> float:
        """The iterations at one timestep; returns their mean loss."""
        total = 0.0
        with torch.enable_grad():
            for _ in range(self.settings.iterations):
                loss = loss_at(text.embed_soft(prefix.sample()), timestep, generator)
                prefix.step(loss)
                total += float(loss.detach())
        return total / self.settings.iterations

    def _chosen(self, prefix: Prefix, generator: torch.Generator) -> Tensor:
        """The prefix to be judged, int64 [k]."""
        if self.settings.search == "gradient":
            return prefix.best()
        tokens, vocabulary = prefix.weights.shape
        return torch.randint(vocabulary, (tokens,), generator=generator).to(prefix.weights.device)

    def _attacked(self, text: PrefixedText, chosen: Tensor) -> dict[str, str | Tensor]:
        if self.settings.judged == "typed":
            return {"prompt": text.text(chosen)[0]}
        return {"prompt_embeds": text.embed(chosen)}

    def _picture(self, seed: int, **prompt: str | Tensor) -> Any:
        """One picture of the pipeline as it is now, with whatever is attached."""
        guidance = self.settings.guidance
        return self.pipe(
            **prompt,
            num_inference_steps=self.settings.steps,
            generator=torch.Generator().manual_seed(seed),
            **({} if guidance is None else {"guidance_scale": guidance}),
        ).images[0]

    def _seen(self, picture: Any) -> str:
        return str(next(iter(self.judge([picture]))))


def _number(prompt: Prompt) -> int:
    """A seed of the attack's own draws, other than that of the start noise."""
    return int(sha256(f"attack {prompt.seed} {prompt.text}")[:12], 16)
