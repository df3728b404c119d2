"""What a run reports: `metrics.jsonl`, one line a step; `speed.jsonl`; TensorBoard and Weights & Biases where asked."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from lbdt.runs.digests import sha256
from lbdt.runs.files import writing
from lbdt.runs.reading import open_regular, parse_json

METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"
_LONGEST = 1 << 20
LOGS = ("tensorboard", "wandb")


class Writer(Protocol):
    """Where metrics go, beside the files."""

    def begin(self, step: int) -> None:
        """Called once, with the first step that will follow."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of one step."""

    def close(self) -> None:
        """Called at the end, also of a run that failed."""


class MetricsFile:
    """`metrics.jsonl` of a folder, one line a step, the same bytes whether a run was interrupted or not.

    It holds no times; those go to `speed.jsonl`, a line at each checkpoint.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """Keeps the lines of the steps before `start`, which a checkpoint vouches for, and cuts off the others.

        Raises:
            ValueError: fewer lines than that, or others.
        """
        self.path, self._speed = folder / METRICS_FILE, folder / SPEED_FILE
        keep = self._length(start) if start else 0
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            if not start:
                self._speed.unlink(missing_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(keep)

    def _length(self, lines: int) -> int:
        """Bytes of the first `lines` lines."""
        length = 0
        try:
            with open_regular(self.path) as file:
                for step in range(lines):
                    line = file.readline(_LONGEST)
                    if not line.endswith(b"\n") or parse_json(line, "a line", advice="")["step"] != step:
                        raise ValueError(f"line {step + 1} is not that of step {step}")
                    length += len(line)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: expected the metrics of the {lines} steps before the checkpoint ({error}); put the "
                f"file back, or delete the checkpoint to start again"
            ) from error
        return length

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds a step's line."""
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n")

    def keep(self, step: int, rows_per_second: float) -> None:
        """Puts all lines on the disk, before a checkpoint after `step` steps vouches for them."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        with writing(self._speed), self._speed.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rows_per_second": round(rows_per_second, 1)}) + "\n")

    def close(self) -> None:
        # After `keep` nothing is left to write; what `log` could not write fails here again.
        with contextlib.suppress(OSError):
            self._file.close()


class TensorBoard:
    """Scalars for TensorBoard in a folder; a resumed run takes over from the step it goes on with."""

    def __init__(self, folder: Path) -> None:
        """Raises ImportError where TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"--log tensorboard: TensorBoard is not installed ({error}); pip install tensorboard"
            ) from error
        self._make, self._folder, self._writer = SummaryWriter, folder, None

    def begin(self, step: int) -> None:
        self._writer = self._make(log_dir=str(self._folder), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with one id for a folder, so that a resumed run goes on where it was."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Raises ImportError where wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"--log wandb: wandb is not installed ({error}); pip install wandb") from error
        self._wandb, self._folder, self._settings, self._run = wandb, folder, settings, None

    def begin(self, step: int) -> None:
        name = sha256(str(self._folder.absolute()))[:16]
        self._run = self._wandb.init(
            project="lbdt", id=name, dir=str(self._folder), config=self._settings, resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def writers(names: Iterable[str], folder: Path, settings: dict[str, Any]) -> list[Writer]:
    """The writers of these names, of LOGS; nothing is written before `begin`.

    Raises:
        ValueError: an unknown name.
        ImportError: one that is not installed.
    """
    made: list[Writer] = []
    for name in dict.fromkeys(names):
        if name not in LOGS:
            raise ValueError(f"--log: expected one of {', '.join(LOGS)}; got {name!r}")
        made.append(
            TensorBoard(folder / "tensorboard")
            if name == "tensorboard"
            else WeightsAndBiases(folder, settings)
        )
    return made
