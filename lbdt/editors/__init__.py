"""Editors: what is attached to a pipeline and changes its pictures, the eraser and the steering baselines."""

from lbdt.editors.edit_report import Report, SteeringReport
from lbdt.editors.editor import Editor, UnetEditor
from lbdt.editors.eraser import ConceptEraser
from lbdt.editors.steering import Steering
from lbdt.editors.text_steering import TextSteering
from lbdt.editors.uce import UCE

__all__ = [
    "ConceptEraser",
    "Editor",
    "Report",
    "Steering",
    "SteeringReport",
    "TextSteering",
    "UCE",
    "UnetEditor",
]
