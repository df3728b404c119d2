"""What the projects' own loaders do, written from the published descriptions (METHOD.md, 7.1 and 7.2), without lbdt.

Each returns pre-activations [n, N], the dense code [n, N] and the reconstruction [n, D] of `x` [n, D].
"""

import json
from pathlib import Path

import safetensors.torch
import torch


def saeuron(folder: Path, x: torch.Tensor, sigmoid: bool = False):
    """`pre = W_enc (x - b_dec) + b_enc`; TopK of its ReLU, or for the diffusion G-SAE the sigmoid of its TopK."""
    config = json.loads((folder / "cfg.json").read_text())
    d_in = config.pop("d_in")  # the loader's first step, and keys that it does not know are dropped
    state = safetensors.torch.load_file(folder / "sae.safetensors")
    assert set(state) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    assert state["encoder.weight"].shape == (config["num_latents"], d_in)
    pre = (x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    values, indices = pre.topk(config["k"], dim=-1)
    code = torch.zeros_like(pre).scatter(-1, indices, values.sigmoid() if sigmoid else values.relu())
    return pre, code, code @ state["W_dec"] + state["b_dec"]


def saeparate(folder: Path, x: torch.Tensor):
    """SAeUron's, whose encoder reads `gelu(W_pre (x - b_dec) + b_pre)` where the configuration says so."""
    config = json.loads((folder / "cfg.json").read_text())
    d_in = config.pop("d_in")
    state = safetensors.torch.load_file(folder / "sae.safetensors")
    read = x - state["b_dec"]
    names = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    if config.get("use_pre_encoder_gelu", False):
        names |= {"pre_encoder.0.weight", "pre_encoder.0.bias"}
        layer = torch.nn.Sequential(torch.nn.Linear(d_in, d_in), torch.nn.GELU())
        layer.load_state_dict({name: state[f"pre_encoder.{name}"] for name in ("0.weight", "0.bias")})
        with torch.no_grad():
            read = layer(read)
    assert set(state) == names
    pre = read @ state["encoder.weight"].T + state["encoder.bias"]
    values, indices = pre.topk(config["k"], dim=-1)
    code = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return pre, code, code @ state["W_dec"] + state["b_dec"]


def unbox(folder: Path, x: torch.Tensor):
    """`pre = W_enc (x - pre_bias) + latent_bias`; TopK, then ReLU."""
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "state_dict.pth", weights_only=True)["state_dict"]
    assert set(state) == {"encoder.weight", "decoder.weight", "pre_bias", "latent_bias", "stats_last_nonzero"}
    assert {"n_dirs_local", "d_model", "k", "auxk", "dead_steps_threshold"} <= set(config)
    assert state["decoder.weight"].shape == (config["d_model"], config["n_dirs_local"])
    assert state["stats_last_nonzero"].dtype == torch.int64
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    values, indices = pre.topk(config["k"], dim=-1)
    code = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return pre, code, code @ state["decoder.weight"].T + state["pre_bias"]
