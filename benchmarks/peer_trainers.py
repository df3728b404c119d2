"""One training step of sparsify, SAELens and dictionary_learning, as their own trainers take it.

Each wrapper gives its trainer the same starting weights, activations and dead latents, and times what the library
calls a step; nothing in that step is replaced. What is done to get there:

- sparsify has no step function: `Trainer.fit` itself is run over one batch, with the model a module that returns the
  activations. The clock runs from the moment the data loader is asked for the batch until `fit` would save; so the
  loader, the hook and the token mask are in it, and saving is not. `stand_in_seconds` is what the model takes of it.
  `fit` sets torch's float32 matmul precision to "high" for the whole process: it holds for its step only.
- SAELens: `SAETrainer.step`, which its `fit` calls; no logging.
- dictionary_learning: `TopKTrainer.update`, which its `trainSAE` calls, after the steps in which it does less.

`wandb` is an empty module here: all three import it or look for it, and none logs. Everything else is the real package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import io
import os
import sys
import time
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PACKAGES = ("eai-sparsify", "sae-lens", "dictionary-learning")
_DEAD = 1 << 40
_HOOKPOINT = "block"


@dataclass(frozen=True)
class Size:
    """Width, latents, k and rows of a step."""

    name: str
    d: int
    latents: int
    k: int
    rows: int


@dataclass(frozen=True)
class Start:
    """What every trainer starts from."""

    size: Size
    x: Tensor
    """[n, d] float32."""
    dead: Tensor
    """[L] bool; the same ones are dead at every step."""
    weights: dict[str, Tensor]
    """encoder.weight [L, d], encoder.bias [L], W_dec [L, d] with unit rows, b_dec [d]; sparsify's names."""
    lr: float

    @property
    def variance(self) -> float:
        """Summed squared deviation from the mean row."""
        return float((self.x - self.x.mean(0)).square().sum())


class Trained(Protocol):
    """A trainer that can be timed."""

    auxk: bool
    """Whether its step has the dead latents' loss."""
    precision: str
    settings: str
    """What it does, for the table."""

    def losses(self) -> dict[str, float]:
        """`fvu`, and `auxk` where it has one, of the first step, which it takes."""

    def step(self) -> float:
        """Takes a step; its seconds."""


def load(folder: Path) -> dict[str, str]:
    """Makes the packages in `folder` importable; their versions.

    Raises:
        ValueError: a package is not there.
    """
    found = {
        each.name.lower().replace("_", "-"): each.version
        for each in metadata.distributions(path=[str(folder)])
    }
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        raise ValueError(
            f"--peers {folder}: expected {', '.join(missing)} there; "
            f"pip install --no-deps --target {folder} -r benchmarks/peers.txt"
        )
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    sys.path.append(str(folder))
    empty = types.ModuleType("wandb")
    empty.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.modules.setdefault("wandb", empty)
    return {name: found[name] for name in PACKAGES}


class Sparsify:
    """`sparsify.Trainer.fit` over one batch a step."""

    precision = "float32"  # its autocast is for CUDA

    def __init__(self, start: Start, optimizer: str, auxk_alpha: float) -> None:
        config = importlib.import_module("sparsify.config")
        trainer = importlib.import_module("sparsify.trainer").Trainer
        stopped = self._stopped = []

        class Clocked(trainer):
            def save(self) -> None:
                stopped.append(time.perf_counter())

        self.start, self.auxk = start, auxk_alpha > 0
        self.model = _Activations(start.x)
        matched = {"lr": start.lr, "lr_warmup_steps": 0} if optimizer == "adam" else {}
        settings = config.TrainConfig(
            sae=config.SparseCoderConfig(num_latents=start.size.latents, k=start.size.k),
            batch_size=1,  # one sequence, of all rows
            optimizer=optimizer,
            auxk_alpha=auxk_alpha,
            hookpoints=[_HOOKPOINT],
            finetune="given",  # keep the weights that it is given
            log_to_wandb=False,
            **matched,
        )
        self._batch = _OneBatch(start.size.rows)
        with _quiet():
            self.trainer = Clocked(settings, self._batch, self.model)
        self._batch.count = 1
        self.coder = self.trainer.saes[_HOOKPOINT]
        self.coder.load_state_dict(start.weights)
        self.settings = f"{optimizer}, AuxK {auxk_alpha:.3g}, no clipping"

    def losses(self) -> dict[str, float]:
        kept: list[Any] = []
        handle = self.coder.register_forward_hook(lambda module, inputs, out: kept.append(out))
        self.step()
        handle.remove()
        return {"fvu": float(kept[0].fvu)} | ({"auxk": float(kept[0].auxk_loss)} if self.auxk else {})

    def step(self) -> float:
        self.trainer.num_tokens_since_fired[_HOOKPOINT][:] = torch.where(self.start.dead, _DEAD, 0)
        self._stopped.clear()
        precision = torch.get_float32_matmul_precision()
        try:
            with _quiet():
                self.trainer.fit()
        finally:
            torch.set_float32_matmul_precision(precision)
        return self._stopped[0] - self._batch.asked

    def stand_in_seconds(self, rounds: int = 20) -> float:
        """Seconds that the model in place of a language model takes of a step, and a hook that does nothing."""
        tokens = self._batch[0]["input_ids"].unsqueeze(0)
        handle = self.model.block.register_forward_hook(lambda *given: None)
        begin = time.perf_counter()
        for _ in range(rounds):
            self.model(tokens)
        handle.remove()
        return (time.perf_counter() - begin) / rounds


class _Activations(nn.Module):
    """A module in place of a language model, whose block's output is the activations, whatever the tokens."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.block = nn.Identity()
        self.x, self.device = x.unsqueeze(0), x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> nn.Module:
        """Where sparsify looks for hookpoints."""
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """[1, n, d]."""
        return self.block(self.x)


class _OneBatch:
    """A data set whose only batch is a sequence of `rows` tokens; notes when it is asked."""

    def __init__(self, rows: int) -> None:
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.count = 1_000_000  # for the schedule of the learning rate, until the trainer is made
        self.asked = 0.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked = time.perf_counter()
        return {"input_ids": self.tokens}

    def select(self, indices: range) -> _OneBatch:
        """Itself: `fit` leaves out the batches before `global_step`."""
        return self


class SAELens:
    """`sae_lens.SAETrainer.step` on a `TopKTrainingSAE`."""

    auxk = True

    def __init__(self, start: Start, *, sparse: bool = False, autocast: bool = False) -> None:
        package = importlib.import_module("sae_lens")
        settings = importlib.import_module("sae_lens.config").SAETrainerConfig
        size = start.size
        config = package.TopKTrainingSAEConfig(
            d_in=size.d,
            d_sae=size.latents,
            k=size.k,
            device=str(start.x.device),
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,  # of sparse ones its backward fails on a CPU
        )
        with torch.random.fork_rng(devices=[]):
            sae = package.TopKTrainingSAE(config)
        with torch.no_grad():
            sae.W_enc.copy_(start.weights["encoder.weight"].T)
            sae.b_enc.copy_(start.weights["encoder.bias"])
            sae.W_dec.copy_(start.weights["W_dec"])
            sae.b_dec.copy_(start.weights["b_dec"])
        trainer = settings(
            total_training_samples=1_000_000 * size.rows,
            train_batch_size_samples=size.rows,
            lr_end=start.lr / 10,  # as its runner sets it; the constant schedule does not read it
            lr=start.lr,
            device=str(start.x.device),
            autocast=autocast,
        )
        self.start = start
        self.trainer = package.SAETrainer(trainer, sae, iter(()))
        self.precision = "bfloat16" if autocast else "float32"
        self.settings = "Adam unfused, AuxK 1, clipping, " + (
            "sparse activations, not rescaled" if sparse else "dense activations, rescaled by decoder norms"
        )
        self.settings += ", autocast" if autocast else ""

    def _step(self) -> tuple[float, Any]:
        self.trainer.n_forward_passes_since_fired[:] = torch.where(self.start.dead, 1e9, 0.0)
        begin = time.perf_counter()
        out = self.trainer.step(self.start.x)
        self.trainer.n_training_steps += 1
        return time.perf_counter() - begin, out

    def losses(self) -> dict[str, float]:
        _, out = self._step()
        over = self.start.size.rows / self.start.variance
        auxk = float(out.losses["auxiliary_reconstruction_loss"])
        return {"fvu": over * float(out.losses["mse_loss"]), "auxk": over * auxk}

    def step(self) -> float:
        return self._step()[0]


class DictionaryLearning:
    """`dictionary_learning`'s `TopKTrainer.update`."""

    auxk, precision = True, "float32"  # its autocast is for CUDA
    settings = "Adam unfused, AuxK 1/32, clipping, unit rows, dense activations"

    def __init__(self, start: Start) -> None:
        trainer = importlib.import_module("dictionary_learning.trainers.top_k").TopKTrainer
        size = start.size
        with torch.random.fork_rng(devices=[]):
            self.trainer = trainer(
                steps=1_000_000,
                activation_dim=size.d,
                dict_size=size.latents,
                k=size.k,
                layer=0,
                lm_name="",
                lr=start.lr,
                warmup_steps=0,
                device=str(start.x.device),
            )
        ae = self.trainer.ae
        with torch.no_grad():
            ae.encoder.weight.copy_(start.weights["encoder.weight"])
            ae.encoder.bias.copy_(start.weights["encoder.bias"])
            ae.decoder.weight.copy_(start.weights["W_dec"].T)
            ae.b_dec.copy_(start.weights["b_dec"])
        self.start = start
        # From here on it updates its threshold too.
        self.at = self.trainer.threshold_start_step

    def _revive(self) -> None:
        self.trainer.num_tokens_since_fired[:] = torch.where(self.start.dead, _DEAD, 0)

    def losses(self) -> dict[str, float]:
        self._revive()
        out = self.trainer.loss(self.start.x, step=self.at, logging=True)
        over = self.start.size.rows / self.start.variance
        auxk = max(0.0, float(self.trainer.pre_norm_auxk_loss))  # -1 where none is dead
        self.step()
        return {"fvu": over * out.losses["l2_loss"], "auxk": over * auxk}

    def step(self) -> float:
        self._revive()
        self.at += 1
        begin = time.perf_counter()
        self.trainer.update(self.at, self.start.x)
        return time.perf_counter() - begin


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
