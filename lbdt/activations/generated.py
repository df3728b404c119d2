"""Activations straight from a pipeline: a source that runs it for the prompts of each shard."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt import ops
from lbdt.activations.capture import Schedule, Stop, capture, choose, denoiser_of, of_text, quiet
from lbdt.activations.pipelines import fingerprint, package_versions
from lbdt.activations.prompts import Prompt, prompt_lines
from lbdt.activations.shard_layout import DTYPES
from lbdt.activations.shuffle import mix
from lbdt.activations.sites import Site
from lbdt.activations.source import Shard, Source, label_places, require_site, shard_count
from lbdt.runs.digests import sha256

_OURS = (
    "prompt",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "num_images_per_prompt",
)


class Generated(Source):
    """Activations of a diffusers pipeline's UNet or transformer (or of its text encoders) for labelled prompts.

    Every shard is one pipeline call. It follows from the settings and its slice of the prompts alone: each image starts
    from noise of its own seed, and patches are drawn by (seed, prompt, timestep). Of text encoders the states of the
    prompts' tokens are taken, [N, d], at one timestep 0.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        sites: Sequence[Site],
        *,
        steps: int,
        guidance: float | None = None,
        prompts_per_shard: int = 16,
        patches: int | None = None,
        timesteps: Sequence[int] | int | None = None,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
        call: dict[str, Any] | None = None,
        concepts: Sequence[str] | None = None,
        styles: Sequence[str] | None = None,
        threads: int | None = None,
        model: str | None = None,
        keep: int = 4,
    ) -> None:
        """Runs the first step of the first prompt, to learn the schedule and the sites' sizes.

        Args:
            pipe: any diffusers text-to-image pipeline; it is left as it was.
            prompts: what to generate, one image each.
            sites: where; all in the denoiser, or all in text encoders.
            steps: denoising steps of a pipeline call.
            guidance: guidance scale; None: the pipeline's own.
            prompts_per_shard: images of one pipeline call, and of one shard.
            patches: M patches of each map, drawn without replacement; None or more than there are: all.
            timesteps: which of the schedule's, by value, or so many spread evenly over it; None: all.
            dtype: of the activations handed out: float16, bfloat16 or float32.
            seed: of the draw of patches.
            call: further arguments of the pipeline call, JSON-like; a text stands for every prompt.
            concepts, styles: names in the order of their numbers; None: as they first appear in the prompts.
            threads: CPU threads of a pipeline call; None: as set.
            model: the pipeline's name in the settings; None: its own.
            keep: shards held for when another site of them is asked for.

        Raises:
            TypeError: not a pipeline.
            ValueError: an argument, what was expected, what was given.
        """
        denoiser_of(pipe)
        self.sites = tuple(sorted(set(sites)))
        self.labelled = tuple(prompts)
        if not self.labelled:
            raise ValueError("prompts: expected at least one")
        for name, value in (("steps", steps), ("prompts_per_shard", prompts_per_shard), ("keep", keep)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        for name, value in (("patches", patches), ("threads", threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, or None, got {value}")
        if dtype not in [known for _, known in DTYPES.values()]:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype}")
        self.prompts, self.prompts_per_shard = len(self.labelled), prompts_per_shard
        self.concepts = _names(
            "concepts", concepts, [name for prompt in self.labelled for name in prompt.shown]
        )
        self.styles = _names("styles", styles, [prompt.style for prompt in self.labelled])
        self._labels = label_places(self.labelled, self.concepts, self.styles)
        self.dtype, self.seed, self.threads = dtype, seed, threads
        self._pipe, self._steps, self._guidance, self._call = pipe, steps, guidance, dict(call or {})
        self._model = _name(model or getattr(pipe, "name_or_path", "") or type(pipe).__name__)
        self._check_call()
        self._text = of_text(self.sites)
        probe = _Probe(pipe, self._text)
        self._generate(self.labelled[:1], probe)
        self._schedule = probe.schedule
        self._sizes = {site: probe.size(site) for site in self.sites}
        self._patches = {site: min(patches or n, n) for site, (n, _, _) in self._sizes.items()}
        self.timesteps = choose(self._schedule.values, timesteps)
        self.device = probe.device
        self._kept: OrderedDict[int, dict[Site, Shard]] = OrderedDict()
        self._keep = keep
        self._fingerprint = cache(lambda: fingerprint(pipe))  # once for all that share the pipeline

    def width(self, site: Site) -> int:
        require_site(self, site)
        return self._sizes[site][1]

    def patches(self, site: Site) -> int:
        require_site(self, site)
        return self._patches[site]

    def shard(self, index: int, site: Site) -> Shard:
        require_site(self, site)
        if index not in self._kept:
            self._kept[index] = self.run(index)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index][site]

    def run(self, index: int) -> dict[Site, Shard]:
        """Shard `index` of every site, by one pipeline call; on the pipeline's device.

        Raises:
            IndexError: no such shard.
            ValueError: NaN or infinite activations, or some that `dtype` cannot hold.
        """
        if not 0 <= index < shard_count(self):
            raise IndexError(f"shard {index}: expected one of {shard_count(self)}")
        part = slice(index * self.prompts_per_shard, (index + 1) * self.prompts_per_shard)
        prompts = self.labelled[part]
        run = _Run(self, part.start, len(prompts))
        self._generate(prompts, run)
        concepts, styles = (label[part] for label in self.labels())
        return {site: Shard(*run.result(site), concepts, styles) for site in self.sites}

    def labels(self) -> tuple[Tensor, Tensor]:
        return self._labels

    def with_prompts(self, prompts: Sequence[Prompt]) -> Generated:
        """The same for other prompts with these labels; the pipeline is not run or looked at again for it."""
        if not prompts:
            raise ValueError("prompts: expected at least one")
        other = copy.copy(self)
        other.labelled, other.prompts = tuple(prompts), len(prompts)
        other._labels = label_places(other.labelled, self.concepts, self.styles)
        other._kept = OrderedDict()
        return other

    def origin(self) -> dict[str, Any]:
        return self.settings()

    def settings(self) -> dict[str, Any]:
        """Everything that the activations follow from, JSON-like."""
        return {
            "versions": package_versions(),
            "device": self.device.type,
            "threads": self.threads,
            "model": self._model,
            "fingerprint": self._fingerprint(),
            "steps": self._steps,
            "guidance": self._guidance,
            "call": self._call,
            "seed": self.seed,
            "sites": [
                {
                    "site": str(site),
                    "width": width,
                    "patches": self._patches[site],
                    "of": n,
                    "grid": None if grid is None else list(grid),
                }
                for site, (n, width, grid) in self._sizes.items()
            ],
            "timesteps": list(self.timesteps),
            "dtype": str(self.dtype).removeprefix("torch."),
            "concepts": list(self.concepts),
            "styles": list(self.styles),
            "prompts": self.prompts,
            "prompts_sha256": sha256(prompt_lines(self.labelled)),
            "prompts_per_shard": self.prompts_per_shard,
        }

    def drawn(self, site: Site, first: int, prompts: int, timestep: int) -> Tensor:
        """The patches taken of each of `prompts` prompts from number `first` on: [prompts, M] int64, ascending.

        By Philox numbers (`lbdt.ops.patch_uniform`) under (seed, prompt number, timestep): the M smallest.
        """
        patches, taken = self._sizes[site][0], self._patches[site]
        if taken == patches:
            return torch.arange(patches).expand(prompts, patches)
        seeds = mix(self.seed, torch.arange(first, first + prompts))
        times = torch.full((prompts,), timestep, dtype=torch.int64)
        u = ops.patch_uniform(seeds, times, torch.zeros_like(times), patches)
        return u.argsort(dim=1, stable=True)[:, :taken].sort(dim=1).values

    def _check_call(self) -> None:
        known = inspect.signature(type(self._pipe).__call__).parameters
        needed = ["prompt", "num_inference_steps", "generator", "output_type"]
        needed += [] if self._guidance is None else ["guidance_scale"]
        missing = [name for name in (*needed, *self._call) if name not in known]
        if missing:
            raise ValueError(
                f"pipe: calls of {type(self._pipe).__name__} take no {', '.join(missing)}; expected a diffusers "
                "text-to-image pipeline"
            )
        taken = sorted(set(self._call) & set(_OURS))
        if taken:
            raise ValueError(f"call: {', '.join(taken)} is set by lbdt; give it by the argument of its own")

    def _generate(self, prompts: Sequence[Prompt], receiver: _Probe | _Run) -> None:
        """One pipeline call, in which `receiver` gets the activations."""
        call = {n: [v] * len(prompts) if isinstance(v, str) else v for n, v in self._call.items()}
        if self._guidance is not None:
            call["guidance_scale"] = self._guidance
        undo = quiet(self._pipe)
        try:
            # Not inference_mode: what models keep of their first call would be unusable outside of it.
            with torch.no_grad(), _threads(self.threads):
                with capture(self._pipe, self.sites, len(prompts), receiver):
                    self._pipe(
                        prompt=[prompt.text for prompt in prompts],
                        num_inference_steps=self._steps,
                        generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
                        output_type="latent",
                        **call,
                    )
        except Stop:
            # The end of every diffusers call, for models that are moved out of the device's memory.
            getattr(self._pipe, "maybe_free_model_hooks", lambda: None)()
        finally:
            undo()


class _Probe:
    """Learns the schedule, and every site's patches, width and grid, from the first call of the denoiser."""

    def __init__(self, pipe: Any, text: bool) -> None:
        self._pipe, self._text = pipe, text
        self._found: dict[Site, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.schedule = Schedule((0,))
        self.device = torch.device("cpu")

    def begin(self, timestep: float) -> bool:
        if not self._text:
            self.schedule = Schedule.of(self._pipe.scheduler.timesteps.tolist(), timestep)
        return True

    def take(self, site: Site, x: Tensor, sample: Tensor) -> None:
        self._found[site], self.device = (tuple(x.shape), tuple(sample.shape)), x.device

    def end(self) -> None:
        # Several text encoders follow each other; the denoiser's first call is enough.
        if not self._text:
            raise Stop

    def size(self, site: Site) -> tuple[int, int, tuple[int, int] | None]:
        """N, d, and the grid where it is known."""
        if site not in self._found:
            raise ValueError(
                f"site {site}: its module did not run in a call of the pipeline; choose another one"
            )
        (_, patches, width), sample = self._found[site]
        if len(sample) == 4:
            for scale in range(1, sample[2] + 1):
                height, rest = divmod(sample[2], scale)
                across, more = divmod(sample[3], scale)
                if not rest and not more and height * across == patches:
                    return patches, width, (height, across)
        return patches, width, None


class _Run:
    """Keeps the wanted timesteps of one pipeline call."""

    def __init__(self, source: Generated, first: int, prompts: int) -> None:
        self._source, self._first, self._prompts = source, first, prompts
        self._schedule = source._schedule
        self._x: dict[Site, Tensor] = {}
        self._patches: dict[Site, Tensor] = {}
        self._peaks: dict[Site, list[Tensor]] = {site: [] for site in source.sites}
        self._seen: set[tuple[Site, int]] = set()
        self._ended: set[int] = set()
        self._at: int | None = None

    def begin(self, timestep: float) -> bool:
        value = self._schedule.nearest(timestep)
        wanted = self._source.timesteps
        # Of calls at a timestep that comes twice only the first one counts; text encoders share their only one.
        fresh = value in wanted and (self._source._text or value not in self._ended)
        self._at = wanted.index(value) if fresh else None
        return fresh

    def take(self, site: Site, x: Tensor, sample: Tensor) -> None:
        source, at = self._source, self._at
        if (site, at) in self._seen:
            raise ValueError(
                f"site {site}: its module ran twice in one call of its model; choose another one"
            )
        self._seen.add((site, at))
        if tuple(x.shape[1:]) != source._sizes[site][:2]:
            raise ValueError(
                f"site {site}: expected {list(source._sizes[site][:2])} patches and width as for the first prompt, "
                f"got {list(x.shape[1:])}"
            )
        if site not in self._x:
            shape = (self._prompts, len(source.timesteps), source.patches(site))
            self._x[site] = x.new_empty((*shape, x.shape[2]), dtype=source.dtype)
            self._patches[site] = torch.empty(shape, dtype=torch.int32)
        drawn = source.drawn(site, self._first, self._prompts, source.timesteps[at])
        self._patches[site][:, at] = drawn
        if source.patches(site) < x.shape[1]:
            index = drawn.to(x.device).unsqueeze(2).expand(-1, -1, x.shape[2])
            x = x.gather(1, index)
        self._peaks[site].append(x.abs().amax())
        self._x[site][:, at] = x

    def end(self) -> None:
        if self._at is not None:
            self._ended.add(self._source.timesteps[self._at])
            self._at = None
        if len(self._seen) == len(self._source.timesteps) * len(self._source.sites):
            raise Stop

    def result(self, site: Site) -> tuple[Tensor, Tensor]:
        """The activations [P, T, M, d] and their patches [P, T, M] int32."""
        got = sum(seen == site for seen, _ in self._seen)
        if got != len(self._source.timesteps):
            raise ValueError(
                f"site {site}: ran at {got} of the {len(self._source.timesteps)} timesteps; choose another one"
            )
        dtype, peak = self._source.dtype, torch.stack(self._peaks[site]).float().max()
        if not bool(torch.isfinite(peak)):
            raise ValueError(
                f"site {site}: NaN or infinite activations; run the pipeline in bfloat16 or float32"
            )
        if not bool(torch.isfinite(peak.to(dtype))):
            raise ValueError(
                f"site {site}: activations up to {float(peak):.6g} overflow {str(dtype).removeprefix('torch.')}; "
                "use --dtype bfloat16 or float32"
            )
        return self._x[site], self._patches[site].to(self._x[site].device)


def _names(name: str, given: Sequence[str] | None, used: Sequence[str | None]) -> tuple[str, ...]:
    used = [label for label in dict.fromkeys(used) if label is not None]
    names = tuple(used if given is None else given)
    unknown = [label for label in used if label not in names]
    if unknown or len(set(names)) < len(names):
        raise ValueError(
            f"{name}: expected each name of the prompts' labels once; got {', '.join(names)}, without "
            f"{', '.join(unknown) or 'repeats'}"
        )
    return names


def _name(model: str) -> str:
    """The pipeline's name; of a local folder without the folders above it, which may differ between two runs."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
