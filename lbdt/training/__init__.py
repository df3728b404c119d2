"""Training of sparse autoencoders: objectives, the loop, published recipes, and the latents that stand for concepts."""

from lbdt.training.assignment import Assignment, assign, load_assignment, save_assignment
from lbdt.training.contrast import Contrast
from lbdt.training.engine import train
from lbdt.training.explained_variance import explain_variance, geometric_median
from lbdt.training.objectives import Dense, Ranked
from lbdt.training.supervision import Supervision
from lbdt.training.training_run import Labels

__all__ = [
    "Assignment",
    "Contrast",
    "Dense",
    "Labels",
    "Ranked",
    "Supervision",
    "assign",
    "explain_variance",
    "geometric_median",
    "load_assignment",
    "save_assignment",
    "train",
]
