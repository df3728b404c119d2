"""The timesteps of a pipeline call, as whole numbers, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TRAINED = 1000
_SHARE = 0.02


@dataclass(frozen=True)
class Schedule:
    """What the denoiser is called with, and the timesteps of the scheduler that these calls stand for."""

    values: tuple[int, ...]
    """Strictly descending, rounded."""
    exact: tuple[float, ...] = (0.0,)
    """The same before rounding."""
    scale: float = 1.0
    """The factor from the denoiser's argument to the scheduler's timesteps: 1000 for models called with t / 1000."""

    @classmethod
    def of(cls, schedule: Sequence[float], first: float) -> Schedule:
        """The schedule whose first call is at `first`. Timesteps that come more than once count once.

        Raises ValueError where the timesteps do not descend by whole numbers, or `first` has another scale.
        """
        exact = tuple(dict.fromkeys(float(t) for t in schedule))
        values = tuple(round(t) for t in exact)
        if not exact or any(a <= b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(
                f"pipe: expected a scheduler with timesteps that descend, and differ when rounded; got {list(exact)}"
            )
        for scale in (1.0, float(_TRAINED)):
            # Pipelines may round their timesteps to half precision.
            if abs(first * scale - exact[0]) <= _SHARE * abs(exact[0]):
                return cls(values, exact, scale)
        raise ValueError(
            f"pipe: its denoiser was called at timestep {first}, but the schedule begins with {exact[0]}"
        )

    def nearest(self, timestep: float) -> int:
        """The timestep of a call with `timestep`."""
        at = min(range(len(self.exact)), key=lambda i: abs(self.exact[i] - timestep * self.scale))
        return self.values[at]


def choose(schedule: Sequence[int], wanted: Sequence[int] | int | None) -> tuple[int, ...]:
    """The wanted timesteps of a schedule, descending: given ones, or so many spread evenly over it (the middles of
    equal parts), or all.

    Raises ValueError naming the schedule.
    """
    if wanted is None:
        return tuple(schedule)
    known = ", ".join(map(str, schedule))
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(schedule):
            raise ValueError(
                f"timesteps: expected a number of them in [1, {len(schedule)}], got {wanted}; or name some of {known}"
            )
        return tuple(schedule[(2 * i + 1) * len(schedule) // (2 * wanted)] for i in range(wanted))
    missing = [t for t in wanted if t not in schedule]
    if missing or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"timesteps: expected some of {known}, each once; got {', '.join(map(str, wanted)) or 'none'}"
        )
    return tuple(sorted(wanted, reverse=True))
