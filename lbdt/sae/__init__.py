"""Sparse autoencoders: configuration, model, checkpoint files; training is in `lbdt.training`."""

from lbdt.sae.config import ACTIVATIONS, SAEConfig
from lbdt.sae.model import SparseAutoencoder, SparseCode

__all__ = ["ACTIVATIONS", "SAEConfig", "SparseAutoencoder", "SparseCode"]
