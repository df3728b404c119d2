"""Editors: what is attached to a pipeline and changes its pictures, the eraser and the steering baselines."""

from lbdt.editors.attachment import Attachment, attached, detach
from lbdt.editors.call_watch import UnprotectedError
from lbdt.editors.edit_report import Report, SteeringReport
from lbdt.editors.editor import Editor
from lbdt.editors.eraser import ConceptEraser
from lbdt.editors.steering import Steering
from lbdt.editors.text_steering import TextSteering
from lbdt.editors.uce import UCE
from lbdt.editors.unet_editor import UnetEditor

__all__ = [
    "Attachment",
    "ConceptEraser",
    "Editor",
    "Report",
    "Steering",
    "SteeringReport",
    "TextSteering",
    "UCE",
    "UnetEditor",
    "UnprotectedError",
    "attached",
    "detach",
]
