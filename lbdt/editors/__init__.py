"""Editors: what is attached to a pipeline and changes its pictures, the eraser and the steering baselines."""

from lbdt.editors.eraser import ConceptEraser
from lbdt.editors.report import SteeringReport
from lbdt.editors.steering import Steering
from lbdt.editors.text import TextSteering

__all__ = ["ConceptEraser", "Steering", "SteeringReport", "TextSteering"]
