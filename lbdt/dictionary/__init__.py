"""The concept-latent dictionary: which latents carry a concept at which timestep, and above which activation."""

from lbdt.dictionary.activation_histograms import Histograms
from lbdt.dictionary.calibration import Calibration
from lbdt.dictionary.concept_dictionary import ConceptDictionary
from lbdt.dictionary.selection import DetectionRates, Selection
from lbdt.dictionary.statistics import ConceptStatistics

__all__ = [
    "Calibration",
    "ConceptDictionary",
    "ConceptStatistics",
    "DetectionRates",
    "Histograms",
    "Selection",
]
