"""An engine with its queue, as one process of a server has it: no Ray here."""

from __future__ import annotations

from collections.abc import Sequence

from lbdt.serving.batcher import Batcher
from lbdt.serving.engine import PictureEngine, Work
from lbdt.serving.front import Served
from lbdt.serving.loading import engine_of
from lbdt.serving.outcome import Failure, Outcome, outcome_of
from lbdt.serving.settings import ServeSettings


class Replica:
    """Loads a pipeline and an eraser, and makes pictures of many tenants in batches."""

    def __init__(self, settings: ServeSettings) -> None:
        """Loads, attaches, and makes one batch without prompts, so that the first picture does not pay for it and an
        engine that can protect none, say for too few steps, does not start.

        Raises:
            ValueError, TypeError, OSError: what loading and `ConceptEraser.attach` raise. UnprotectedError, or what the
                pipeline raises: it cannot make pictures.
        """
        self.settings = settings
        self.engine, self.served = load_engine(settings)
        (made,) = self.engine.generate([Work("", 0, self.served.concepts[:1])])
        if isinstance(made, Exception):
            raise made
        self._batcher: Batcher[Work, Outcome] = Batcher(
            self._run, most=settings.batch, wait=settings.batch_wait, kind=lambda work: work.size
        )

    async def make(self, tenant: str, work: Work, eraser: str | None = None) -> Outcome:
        """The tenant's picture, in a batch with whatever else waits; what is cancelled before that is not made.

        `eraser`: the fingerprint that the audit will name. A replica that was started later may have loaded another one
        from the same place; then nothing is made.
        """
        if eraser not in (None, self.served.eraser):
            return Failure("failed", "this engine has another eraser; restart the server")
        return await self._batcher.submit(tenant, work)

    @property
    def is_alive(self) -> bool:
        """Whether it answers what it is asked for."""
        return self._batcher.is_alive

    async def close(self) -> None:
        """Finishes what was taken, and takes the eraser off."""
        await self._batcher.close()
        self.engine.close()

    def _run(self, works: list[Work]) -> Sequence[Outcome]:
        try:
            return [outcome_of(made) for made in self.engine.generate(works)]
        except Exception as error:
            # By its kind only: its text may quote a prompt, and Ray logs what an actor raises.
            return [Failure("failed", type(error).__name__)] * len(works)


def load_engine(settings: ServeSettings) -> tuple[PictureEngine, Served]:
    """The engine of the settings, and what it serves with."""
    from lbdt.canvas.defaults import NAME

    engine, eraser = engine_of(settings)
    return engine, Served(settings.model or NAME, eraser.digest(), tuple(eraser.concepts))
