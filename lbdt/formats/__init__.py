"""Other projects' files: checkpoints, latents pickles and steering parameters, read without running any code.

Layouts: METHOD.md, 7. Every reader refuses what it does not understand, by name.
"""

from __future__ import annotations

FORMATS = ("auto", "lbdt", "saeuron", "saemnesia", "saeparate", "gsae", "sdxl-unbox", "steerers", "sparsify")
"""SAE checkpoint formats, as `SparseAutoencoder.from_pretrained(format=...)` takes them."""

SOURCES = (*FORMATS, "latents", "class-params")
"""What `lbdt convert --from` takes."""
