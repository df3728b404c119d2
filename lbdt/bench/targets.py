"""What the times have to be, and whether they are: only sizes of real hookpoints count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lbdt.bench.cases import PLAIN

_SHAPE = "sd15-b1"
_MB = 1e6
_MOST_EXTRA = 32 * _MB


def targets(rows: list[dict[str, Any]], unet: dict[str, Any] | None, device: str) -> list[dict[str, Any]]:
    """`{"target": text, "got": number or None, "met": bool}` for each target that the rows speak about."""
    found: list[dict[str, Any]] = []

    def add(text: str, got: float | None, met: bool) -> None:
        found.append({"target": text, "got": got, "met": met})

    def least(text: str, rows: list[dict[str, Any]], baseline: str, wanted: float) -> None:
        ratios = [row["ratio"][baseline] for row in rows if baseline in row["ratio"]]
        if ratios:
            add(
                f"{text}: at least {wanted:g} times as fast as {baseline}", min(ratios), min(ratios) >= wanted
            )

    detect = _pick(rows, "detect_patches", "")
    hook = _pick(rows, "hook", "")
    if device == "cuda":
        for share in (0.5, 1.0):
            for row in detect(share):
                got = row["times_the_floor"]
                add(f"detect_patches, {share:.0%}: within 1.5 times its floor", got, got <= 1.5)
        for row in detect(0.0):
            # What cannot be captured is not fast: the target is missed, and the row says why.
            warm = row["versions"]["ours"].get("graph", {}).get("warm")
            got = 1e3 * warm["median"] if warm else None
            add(
                "detect_patches, 0%, in a CUDA graph: under 15 microseconds",
                got,
                warm is not None and got < 15,
            )
        least("hook, every share", hook(None), "published", 30)
        for name, most in (("present", 0.5), ("absent", 0.1)):
            if unet is not None:
                got = unet[name]["percent_of_step"]
                add(f"hook, concept {name}: under {most:g} % of a UNet step", got, got < most)
        return found
    least("detect_patches, 0%", detect(0.0), "literal", 100)
    least("detect_patches, 10%", detect(0.1), "literal", 3)
    every = [row for row in rows if (row["op"], row["shape"]) == ("detect_patches", _SHAPE)]
    if every:
        most = max(row["versions"]["ours"]["allocated_bytes"] for row in every)
        add("detect_patches, every share: less than 32 MB extra", most / _MB, most < _MOST_EXTRA)
    least("replace_patches_, 10%", _pick(rows, "replace_patches_", PLAIN)(0.1), "reference", 3)
    for share, wanted in ((0.0, 150), (0.1, 4), (1.0, 1.3)):
        least(f"hook, {share:.0%}", hook(share), "published", wanted)
    return found


def _pick(
    rows: list[dict[str, Any]], op: str, variant: str
) -> Callable[[float | None], list[dict[str, Any]]]:
    """The op's rows at SD 1.5 sizes for one image, by share; None: all."""
    own = [row for row in rows if (row["op"], row["shape"], row["variant"]) == (op, _SHAPE, variant)]
    return lambda share: [row for row in own if share is None or row["share"] == share]
