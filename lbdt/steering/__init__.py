"""Steering: the published baselines that edit SAE latents, attached to a pipeline exactly like the eraser."""

from lbdt.steering.report import SteeringReport
from lbdt.steering.steering import Steering
from lbdt.steering.text import TextSteering

__all__ = ["Steering", "SteeringReport", "TextSteering"]
