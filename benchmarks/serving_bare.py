"""The same server without an eraser: what `benchmarks.serving` compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lbdt.serving.engine import Picture, PictureEngine, Work, png_of
from lbdt.serving.replica import Replica
from lbdt.serving.settings import ServeSettings


class BareEngine(PictureEngine):
    """Pictures of the bare pipeline, whatever is to be erased from them."""

    def _attach(self, rows: int) -> None:
        self._attachment, self._rows = self, rows

    def remove(self) -> None:
        """Nothing is attached."""

    def _called(self, works: Sequence[Work], enabled: bool = True) -> Iterator[Picture]:
        spare = self.batch - len(works)
        pictures = self.pipe(
            [work.prompt for work in works] + [""] * spare,
            generator=[torch.Generator().manual_seed(s) for s in [w.seed for w in works] + [0] * spare],
            **self._call,
        ).images
        for _, picture in zip(works, pictures, strict=False):
            yield Picture(png_of(picture), True)


class BareReplica(Replica):
    """A replica of a bare engine."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(settings)
        erasing = self.engine
        erasing.close()
        call = erasing._call
        self.engine = BareEngine(
            erasing.pipe,
            erasing.eraser,
            batch=erasing.batch,
            steps=call["num_inference_steps"],
            guidance=call.get("guidance_scale"),
        )
