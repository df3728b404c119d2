"""The published recipes as data (METHOD.md, 6.1), and what this project changes for small worlds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lbdt.sae import SAEConfig
from lbdt.training.contrast import Contrast
from lbdt.training.objectives import Dense, Objective, Ranked
from lbdt.training.supervision import Supervision


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run needs to know beside its activations."""

    name: str
    about: str
    """One line for people."""
    objectives: Mapping[str, Objective]
    """The objectives by variant; the first one is the default."""
    activation: str = "topk"
    batch_topk: bool = False
    normalize_decoder: bool = True
    pre_encoder: bool = False
    expansion: int = 16
    """Latents over the activations' width."""
    k: int = 32
    ks: Mapping[str, int] = field(default_factory=dict)
    """k of variants that have another."""
    rows: int = 4096
    """Rows of a batch; supervised recipes take whole images of as many patches in all."""
    lr: float = 4e-4
    adam_eps: float = 6.25e-10
    epochs: int = 5
    """Passes over the activations where no number of steps is given."""
    update: bool = False
    """Only activations of kind "update" are accepted."""
    fine_tunes: bool = False
    """Starts from a trained SAE, whose sizes it keeps."""
    supervised: bool = False
    by_construction: bool = False
    """Latent i stands for name i; otherwise latents are assigned by score."""
    contrastive: bool = False
    """Labels are compared only: no latent is assigned."""

    def objective(self, variant: str | None = None, **overrides: Any) -> Objective:
        """The objective of a variant, with fields of it or of its supervision replaced where not None.

        Raises:
            ValueError: an unknown variant, or a field that the objective has not.
        """
        variant = variant or next(iter(self.objectives))
        if variant not in self.objectives:
            raise ValueError(f"variant: recipe {self.name} has {', '.join(self.objectives)}; got {variant!r}")
        objective = self.objectives[variant]
        for name, value in overrides.items():
            if value is None:
                continue
            supervision = getattr(objective, "supervision", None)
            if hasattr(objective, name):
                objective = replace(objective, **{name: value})
            elif supervision is not None and hasattr(supervision, name):
                objective = replace(objective, supervision=replace(supervision, **{name: value}))
            else:
                raise ValueError(
                    f"{name.replace('_', '-')}: recipe {self.name} has no such setting; leave it out"
                )
        return objective

    def config(
        self,
        width: int,
        *,
        update: bool,
        expansion: int | None = None,
        k: int | None = None,
        batch_topk: bool | None = None,
    ) -> SAEConfig:
        """The configuration of a new SAE for activations of a width, updates or not; None: as the recipe says."""
        expansion = self.expansion if expansion is None else expansion
        return SAEConfig(
            d_in=width,
            num_latents=width * expansion,
            k=self.k if k is None else k,
            activation=self.activation,
            update=update,
            expansion_factor=expansion,
            normalize_decoder=self.normalize_decoder,
            batch_topk=self.batch_topk if batch_topk is None else batch_topk,
            pre_encoder=self.pre_encoder,
        )


_SAEURON = Recipe(
    name="saeuron",
    about="BatchTopK with AuxK on a block's output; per-patch TopK at inference (arXiv 2501.18052)",
    objectives={"released": Ranked()},
    batch_topk=True,
)

_SAEMNESIA = Recipe(
    name="saemnesia",
    about="fine-tunes an SAE so that one latent stands for each concept and style (ICML 2026)",
    objectives={
        "image": Ranked(
            supervision=Supervision("image", weight=0.3, decorrelation=0.1, pool=0.25, strength=3.0)
        ),
        # Weights of the paper's terms are not known; these are the released code's.
        "paper": Ranked(supervision=Supervision("paper", weight=3.0, decorrelation=0.1, l1=0.01)),
        "released": Ranked(
            reconstruction="mse",
            auxk_alpha=0.0,
            supervision=Supervision("released", weight=3.0, decorrelation=0.1, l1=0.01),
        ),
    },
    lr=5e-6,
    adam_eps=1e-8,
    epochs=150,
    fine_tunes=True,
    supervised=True,
)

_SAEPARATE = Recipe(
    name="saeparate",
    about="BatchTopK behind a linear map and GELU, images of a label drawn together (arXiv 2605.12122)",
    objectives={
        "object": Ranked(supervision=Contrast("concepts")),
        "style": Ranked(supervision=Contrast("styles")),
        "joint": Ranked(supervision=Contrast("both", weight=1.0, hard=4.0)),
    },
    batch_topk=True,
    pre_encoder=True,
    ks={"joint": 64},
    rows=131_072,
    epochs=40,
    supervised=True,
    contrastive=True,
)

_GSAE = Recipe(
    name="gsae",
    about="sigmoid of TopK, latent i taught to stand for concept i by cross-entropy (NeurIPS 2025)",
    objectives={
        "image": Ranked(
            supervision=Supervision("image", weight=0.3, decorrelation=0.0, pool=0.25, strength=3.0)
        ),
        "released": Ranked(
            reconstruction="relative",
            auxk_alpha=0.0,
            supervision=Supervision("sparse-sigmoid", weight=1.0, decorrelation=0.0),
        ),
    },
    activation="topk_sigmoid",
    normalize_decoder=False,
    lr=5e-6,
    epochs=350,
    supervised=True,
    by_construction=True,
)

_SDXL = Recipe(
    name="sdxl",
    about="TopK with AuxK on what a block adds to its input, for SDXL Turbo (NeurIPS 2025)",
    objectives={"released": Ranked(reconstruction="scaled-mse", auxk=256)},
    expansion=4,
    k=10,
    lr=1e-4,
    epochs=1,
    update=True,
)

_RELU = Recipe(
    name="relu",
    about="ReLU with an L1 penalty on activations times decoder norms",
    objectives={"l1": Dense()},
    activation="relu",
    k=0,
)

_JUMPRELU = Recipe(
    name="jumprelu",
    about="JumpReLU with a straight-through L0 penalty (arXiv 2407.14435)",
    objectives={"l0": Dense(sparsity=2e-3)},
    activation="jumprelu",
    k=0,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_SAEURON, _SAEMNESIA, _SAEPARATE, _GSAE, _SDXL, _RELU, _JUMPRELU)
}


def recipe_named(name: str) -> Recipe:
    """One of RECIPES; ValueError naming them."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]
