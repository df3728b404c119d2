"""Small files in the layouts that other projects publish: `python -m tests.formats.fixtures DIR` writes one of each.

Layouts of METHOD.md, 7, written without lbdt.
"""

import json
import pickle
import pickletools
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

D, N, K = 6, 12, 3
CLASSES = ("Cats", "Dogs", "Trees")
SAMPLES, STEPS = 4, 5
PARAMS = {"Cats": (99.999, -30.0), "Dogs": (99.99, -15.0), "Trees": (99.995, -1.0)}

SAEURON = {
    "expansion_factor": N // D,
    "normalize_decoder": True,
    "num_latents": N,
    "k": K,
    "batch_topk": True,
    "sample_topk": False,
    "input_unit_norm": False,
    "multi_topk": False,
    "d_in": D,
}
SAEPARATE = {**SAEURON, "use_pre_encoder_gelu": True}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": N // D,
    "normalize_decoder": True,
    "num_latents": N,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}
RUN = "text_encoder.text_model.encoder.layers.9_k3_hidden12_auxk4_bs4096_lr0.0004_2025-01-09T21:29:10.453881"
"""The folder of a run of Concept Steerers, as its training script names it."""
SAELENS = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "activation_fn_str": "relu",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "dtype": "torch.float32",
}
DICTIONARY_LEARNING = {
    "trainer": {
        "trainer_class": "TrainerTopK",
        "dict_class": "AutoEncoderTopK",
        "activation_dim": D,
        "dict_size": N,
        "k": K,
        "layer": 8,
        "submodule_name": "resid_post_layer_8",
    },
    "buffer": {"d_submodule": D, "ctx_len": 128},
}
UNBOX = {"n_dirs_local": N, "d_model": D, "k": K, "auxk": 4, "dead_steps_threshold": 2441}


def weights() -> dict[str, torch.Tensor]:
    """W_enc [N, D], b_enc [N], W_dec [N, D] with unit rows, b [D]."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    made["W_dec"] /= made["W_dec"].norm(dim=1, keepdim=True)
    return made


SHAPES = {"W_enc": (N, D), "b_enc": (N,), "W_dec": (N, D), "b": (D,)}


def saeuron(folder: Path, config: dict | None = None, **tensors) -> Path:
    """SAeUron's, SAEmnesia's, G-SAE's (diffusion) and, with its config, sparsify's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config or SAEURON))
    w = weights()
    state = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b"]}
    state = {name: tensor for name, tensor in (state | tensors).items() if tensor is not None}
    safetensors.torch.save_file(state, folder / "sae.safetensors")
    return folder


def saeparate(folder: Path, config: dict | None = None, **tensors) -> Path:
    """SAEParate's folder: SAeUron's, and the linear map before the encoder."""
    generator = torch.Generator().manual_seed(7)
    pre = {
        "pre_encoder.0.weight": torch.randn(D, D, generator=generator),
        "pre_encoder.0.bias": torch.randn(D, generator=generator),
    }
    return saeuron(folder, config or SAEPARATE, **(pre | tensors))


def unbox(folder: Path, config: dict | None = None, name: str = "config.json", wrap: bool = True, **tensors):
    """sdxl-unbox's and steerers' folder: a state_dict inside of a dictionary, the decoder column-major."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config or UNBOX))
    w = weights()
    module = torch.nn.Module()
    module.encoder = torch.nn.Linear(D, N, bias=False)
    module.decoder = torch.nn.Linear(N, D, bias=False)
    module.pre_bias, module.latent_bias = torch.nn.Parameter(w["b"]), torch.nn.Parameter(w["b_enc"])
    module.register_buffer("stats_last_nonzero", torch.zeros(N, dtype=torch.long))
    module.encoder.weight.data = w["W_enc"]
    module.decoder.weight.data = w["W_dec"].clone().T
    state = module.state_dict()
    for key, tensor in tensors.items():
        state.pop(key) if tensor is None else state.update({key: tensor})
    torch.save({"state_dict": state} if wrap else state, folder / "state_dict.pth")
    return folder


def saelens(folder: Path, config: dict | None = None) -> Path:
    """SAELens's folder: its decoder and encoder lie the other way round."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config or SAELENS))
    w = weights()
    state = {"W_enc": w["W_enc"].T.contiguous(), "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b"]}
    safetensors.torch.save_file(state, folder / "sae_weights.safetensors")
    return folder


def dictionary_learning(folder: Path, config: dict | None = None) -> Path:
    """A trainer's folder of dictionary_learning."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or DICTIONARY_LEARNING))
    w = weights()
    state = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    torch.save({**state, "b_dec": w["b"], "k": torch.tensor(K)}, folder / "ae.pt")
    return folder


def latents() -> dict[str, np.ndarray]:
    """{class: [samples, steps, latents] float16 >= 0}: spatial means, most of them 0."""
    generator = np.random.default_rng(0)
    made = {}
    for name in CLASSES:
        values = generator.random((SAMPLES, STEPS, N)) * (generator.random((SAMPLES, STEPS, N)) < 0.3)
        made[name] = values.astype(np.float16)
    return made


def latents_pickle(path: Path, protocol: int = 4, kind: str = "numpy") -> Path:
    """SAeUron's own script pickles torch tensors; others numpy arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = latents()
    if kind == "torch":
        values = {name: torch.from_numpy(array) for name, array in values.items()}
    path.write_bytes(pickle.dumps(values, protocol))
    return path


def large_pickle(
    path: Path, shape: tuple[int, int, int], kind: str = "numpy", names=("Cats", "Dogs")
) -> None:
    """What pickle writes for {name: float16 array}: ones in the first and last sample, the others a hole of the
    file that takes no disk."""
    sample, numel = np.ones(shape[1:], np.float16).tobytes(), int(np.prod(shape))
    sizes, strides = _opcodes(shape), _opcodes((shape[1] * shape[2], shape[2], 1))
    if kind == "numpy":
        head = (
            b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            + _opcodes((0,))
            + b"C\x01b\x87R(K\x01"
        )
        dtype = _opcodes("f2") + b"\x89\x88\x87R" + _opcodes((3, "<", None, None, None, -1, -1, 0)) + b"b"
        head += sizes + b"cnumpy\ndtype\n" + dtype + b"\x89"
        inner, tail = b"", b"tb"
    else:
        parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, ["0"])
        magic, protocol, system, keys = (pickle.dumps(part, 2) for part in parts)
        which = _opcodes("storage") + b"ctorch\nHalfStorage\n" + _opcodes("0") + _opcodes("cpu")
        storage = b"\x80\x02(" + which + _opcodes(numel) + b"NtQ."
        inner = magic + protocol + system + storage + keys + numel.to_bytes(8, "little")
        head = b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
        tail = b"\x85RK\x00" + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR"
    with path.open("wb") as file:
        file.write(b"\x80\x04}(")
        for name in names:
            file.write(
                _opcodes(name) + head + b"\x8e" + (len(inner) + 2 * numel).to_bytes(8, "little") + inner
            )
            file.write(sample)
            file.seek(len(sample) * (shape[0] - 2), 1)
            file.write(sample + tail)
        file.write(b"u.")


def _opcodes(value) -> bytes:
    """A pickled value without its header and its end; protocol 3 has no frames, and its memo goes."""
    return pickletools.optimize(pickle.dumps(value, 3))[2:-1]


def class_params(path: Path, key: str = "multiplier") -> Path:
    """SAeUron's file of the best parameters; G-SAE's has "alpha" for the key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: {"percentile": p, key: m} for name, (p, m) in PARAMS.items()}
    torch.save(values, path)
    return path


def write(root: Path) -> None:
    """One of each."""
    hook = "unet.up_blocks.1.attentions.1"
    saeuron(root / "saeuron" / hook)
    saeuron(root / "gsae" / hook)
    saeparate(root / "saeparate" / hook)
    saeuron(root / "sparsify", SPARSIFY)
    unbox(root / "sdxl-unbox" / f"{hook}_k3_hidden12" / "final")
    unbox(root / "steerers", {**UNBOX, "auxk_coef": 1 / 32})
    unbox(root / "saemnesia", name="cfg.json")
    for protocol in (2, 4, 5):
        latents_pickle(root / f"protocol{protocol}" / f"cls_latents_dict_{hook}.pkl", protocol)
    latents_pickle(root / "torch" / f"cls_latents_dict_{hook}.pkl", kind="torch")
    class_params(root / "torch" / "class_params.pth")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
