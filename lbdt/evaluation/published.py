"""Published figures, to be shown beside one's own and never in one table with them.

They were measured on Stable Diffusion 1.5 fine-tuned on UnlearnCanvas (and SDXL Turbo), with its ViT-L classifiers and
Qwen2-VL-7B as the judge of artifacts, whose prompt is not known. Nothing measured here is comparable to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lbdt.evaluation.metrics.accuracy import average

WHERE_ERASURE = (
    "Project page of PER (eidoslab.github.io/PER, Table 1; Cassano et al., arXiv 2606.31699): Stable Diffusion 1.5 "
    "fine-tuned on UnlearnCanvas (SDXL-Turbo in the last two rows), 20 objects x 51 prompts, ViT-L/16 classifiers, "
    "artifact rate by Qwen2-VL-7B"
)
WHERE_ATTACK = (
    "Project page of PER (eidoslab.github.io/PER, Table 2): UnlearnDiffAtk, 5-token prefix, 40 iterations; "
    "20 objects x 50 styles of UnlearnCanvas"
)
WHERE_METHODS = (
    "Project page of SAEmnesia (repository EIDOSLAB/SAEmnesia): Stable Diffusion 1.5 fine-tuned on UnlearnCanvas; "
    "FID with torchvision's Inception v3, not comparable to the standard one"
)
NOTES = (
    "saemnesia, PER: the average is printed as 93.45; UA, IRA and CRA give 93.75, and with them the printed GA.",
    "sdxl, PER: IRA is printed as 35.41; 53.41 (two digits exchanged) reproduces both the printed average and GA.",
    "GA is recomputed: the mean of UA, IRA, CRA and 100 - AR, without CRA where there is none. That reproduces "
    "the printed GA of all eight rows to 0.01; the page does not state the formula.",
    "sdxl, steering: UA 95.00 and IRA 5.00 are what a classifier gives that calls every picture the same.",
)


@dataclass(frozen=True)
class ErasureRow:
    """A row of the page's Table 1, per cent; a misprinted figure is the corrected one here."""

    pipeline: str
    """One of EmojiCanvas's kinds."""
    method: str
    """ "steering" | "per"."""
    UA: float
    IRA: float
    CRA: float | None
    AR: float
    printed_average: float
    """The printed mean of UA, IRA and CRA."""
    printed_global_average: float
    misprints: Mapping[str, float] = field(default_factory=dict)
    """Name of a corrected figure -> what the page prints."""

    @property
    def average(self) -> float:
        """Recomputed mean of UA, IRA and CRA, per cent."""
        return average([self.UA, self.IRA, self.CRA])


@dataclass(frozen=True)
class AttackRow:
    """A row of the page's Table 2: UA in per cent before and after UnlearnDiffAtk."""

    pipeline: str
    method: str
    before: float
    after: float
    printed_drop: float

    @property
    def drop(self) -> float:
        """Percentage points that the attack takes from UA."""
        return self.before - self.after


@dataclass(frozen=True)
class MethodRow:
    """A row of SAEmnesia's table (METHOD.md, 10.4); None where nothing is printed."""

    method: str
    task: str
    """What is erased: "objects" | "styles"."""
    UA: float
    IRA: float
    CRA: float
    printed_average: float | None = None
    FID: float | None = None
    memory_gb: float | None = None
    storage_gb: float | None = None

    @property
    def average(self) -> float:
        """Recomputed mean of UA, IRA and CRA, per cent."""
        return average([self.UA, self.IRA, self.CRA])


ERASURE = (
    ErasureRow("saeuron", "steering", 87.16, 85.57, 74.14, 57.0, 82.29, 72.47),
    ErasureRow("saeuron", "per", 85.37, 81.14, 86.55, 16.3, 84.35, 84.19),
    ErasureRow("saemnesia", "steering", 94.65, 91.39, 88.48, 49.8, 91.51, 81.18),
    ErasureRow("saemnesia", "per", 91.37, 91.92, 97.97, 15.5, 93.45, 91.44, {"average": 93.45}),
    ErasureRow("gsae", "steering", 78.14, 96.14, 95.56, 43.1, 89.94, 81.69),
    ErasureRow("gsae", "per", 94.02, 96.11, 95.87, 22.5, 95.33, 90.88),
    ErasureRow("sdxl", "steering", 95.00, 5.00, None, 61.0, 50.0, 46.33),
    ErasureRow("sdxl", "per", 94.31, 53.41, None, 8.0, 73.86, 79.90, {"IRA": 35.41}),
)
"""Project page of PER, Table 1 (METHOD.md, 10.2)."""

ATTACK = (
    AttackRow("saeuron", "steering", 83.7, 34.2, 49.5),
    AttackRow("saeuron", "per", 84.6, 28.3, 56.3),
    AttackRow("saemnesia", "steering", 97.6, 57.5, 40.1),
    AttackRow("saemnesia", "per", 91.1, 56.2, 34.9),
)
"""Project page of PER, Table 2 (METHOD.md, 10.3)."""

METHODS = (
    MethodRow("ESD", "objects", 92.15, 55.78, 44.23, 64.05, 65.55, 17.8, 4.3),
    MethodRow("FMN", "objects", 45.64, 90.63, 73.46, 69.91, 131.37, 17.9, 4.2),
    MethodRow("UCE", "objects", 94.31, 39.35, 34.67, 56.11, 182.01, 5.1, 1.7),
    MethodRow("CA", "objects", 46.67, 90.11, 81.97, 72.92, 54.21, 10.1, 4.2),
    MethodRow("SalUn", "objects", 86.91, 96.35, 99.59, 94.28, 61.05, 30.8, 4.0),
    MethodRow("SEOT", "objects", 23.25, 95.57, 82.71, 67.18, 62.38, 7.34, 0),
    MethodRow("SPM", "objects", 71.25, 90.79, 81.65, 81.23, 59.79, 6.9, 0),
    MethodRow("EDiff", "objects", 86.67, 94.03, 48.48, 76.39, 81.42, 27.8, 4.0),
    MethodRow("SHS", "objects", 80.73, 81.15, 67.99, 76.62, 119.34, 31.2, 4.0),
    MethodRow("SAeUron", "objects", 87.16, 85.57, 74.14, 82.29, 62.69, 2.8, 0.2),
    MethodRow("SAEmnesia", "objects", 94.65, 91.39, 88.48, 91.51, 56.15, 2.8, 0.2),
    MethodRow("SAeUron", "styles", 95.80, 99.10, 99.40),
    MethodRow("SAEmnesia", "styles", 96.60, 98.67, 99.30),
)
"""Project page and README of SAEmnesia (METHOD.md, 10.4); the means were checked against the printed ones."""
