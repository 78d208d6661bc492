"""A quantised checkpoint folder, mapped as the kernels read it.

    config.json          the official layout, and quantization_config {quant_method, version, format}
    model.safetensors    our parameter names; packed matrices as U8 at multiples of 64 bytes, then the rest
      __metadata__       "quantization": {version, format, matrices: {module: {kind, error, ...}}}
    and tokenizer, processor and preprocessor files as in every folder

`docs/quantization.md` describes the bytes. What the metadata lists is exactly what is packed: a file with
more, fewer or other tensors is refused by name.

Opening reads no matrix: to look at each number costs more than all else, and all were finite when they were
written. `check_numbers` looks at them (`seekvl verify`), and should one be damaged after all, the first
answer that meets it stops with an error (`engine.sampler`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.models.quantized import KINDS, Kind, quantized_like, quantized_modules, scales_of
from seekvl.runtime import SeekVLError
from seekvl.weights.config import QUANT_VERSION
from seekvl.weights.key_map import KeyMap, Target, parameter_shapes
from seekvl.weights.quantize import Matrix
from seekvl.weights.read import SINGLE, STORED, fill, map_file, mapped, match, read_folder, require_finite

METADATA = "quantization"
"""Key of the header's metadata."""

ALIGNMENT = 64
"""Bytes at whose multiples packed matrices begin: a line of the cache, and of a tile."""


def load_quantized(
    model: nn.Module, folder: Path, *, kind: Kind, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a network built on the meta device with a quantised folder: packed matrices stay in the mapped
    file, as does what has this dtype already; the rest arrives in it.

    Raises SeekVLError before anything is read when metadata, names, shapes or dtypes do not fit the network,
    for another device than the CPU, and for numbers that are not finite among those that are read: vectors,
    and what takes another dtype.
    """
    if device.type != "cpu":
        raise SeekVLError(
            f"{folder} is quantised for the CPU and cannot be loaded on {device}; use device='cpu', or the "
            "checkpoint it was made from"
        )
    put_modules(model, stored_matrices(folder, kind=kind), where=folder / SINGLE)
    shapes = parameter_shapes(model)
    key_map = KeyMap(
        layout=f"seekvl {kind}",
        targets={name: Target(parameter=name) for name in shapes},
        unused={},
        prefixes={},
    )
    places = match(read_folder(folder, dtypes=STORED), key_map=key_map, shapes=shapes)
    packed = packed_keys(model)
    for key, place in places.items():
        if (place.dtype == "U8") != (key in packed):
            wanted = "U8" if key in packed else "F32, F16 or BF16"
            raise SeekVLError(f"{place.file}: tensor {key} is stored as {place.dtype}, expected {wanted}")
    pages = map_file(folder / SINGLE)
    state: dict[str, Tensor] = {}
    for key, place in places.items():
        source = mapped(pages, place)
        state[key] = source if key in packed else source.to(dtype)
        if state[key] is not source or len(place.shape) == 1:
            require_finite(state[key], key=key, source=source)
    fill(model, state)


def check_numbers(model: nn.Module) -> None:
    """Look at every number of a quantised network: the scales of packed matrices, and all that is plain.

    Raises SeekVLError with the name of what holds NaN or infinity.
    """
    packed = packed_keys(model)
    for key, tensor in model.state_dict().items():
        numbers = scales_of(tensor, kind=packed[key]) if key in packed else tensor
        require_finite(numbers, key=key, source=numbers)


def stored_matrices(folder: Path, *, kind: Kind | None = None) -> tuple[Matrix, ...]:
    """Return what the file of a quantised folder says of its matrices, without reading them.

    Raises SeekVLError where it says nothing, or something else than `kind`, the format of `config.json`.
    """
    path = folder / SINGLE
    if not path.exists():
        raise SeekVLError(f"{folder} has a quantised config.json but no {SINGLE}: copy the whole folder")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError) as error:
        raise SeekVLError(f"{path} is cut short or no safetensors file ({error}): convert again") from error
    if text is None:
        raise SeekVLError(
            f"{path} holds plain weights, but config.json says they are quantised: one of the two belongs to "
            "another folder"
        )
    try:
        values = json.loads(text)
        version, said = values["version"], values["format"]
        matrices = tuple(
            Matrix(name=name, **{**entry, "bare": tuple(entry.get("bare", ()))})
            for name, entry in values["matrices"].items()
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SeekVLError(f"{path} has garbled {METADATA} metadata: convert again") from error
    if version != QUANT_VERSION or (kind is not None and said != kind):
        raise SeekVLError(
            f"{path} is {said}, version {version}, but config.json says {kind}, version {QUANT_VERSION}: one "
            "of the two belongs to another folder"
        )
    return matrices


def put_modules(model: nn.Module, matrices: Sequence[Matrix], *, where: Path) -> None:
    """Put empty quantised modules in the place of those that the metadata lists as packed."""
    modules = dict(model.named_modules())
    for matrix in matrices:
        if matrix.kind is None:
            continue
        module = modules.get(matrix.name)
        if matrix.kind not in KINDS or not isinstance(module, nn.Linear | Experts):
            raise SeekVLError(
                f"{where}: {matrix.name} is listed as {matrix.kind}, but this network has no such linear "
                "layer or experts: file and config.json belong to different checkpoints"
            )
        parent, _, name = matrix.name.rpartition(".")
        setattr(modules[parent], name, quantized_like(module, matrix.kind))


def packed_keys(model: nn.Module) -> dict[str, Kind]:
    """Return name -> kind of every packed tensor in a network's state."""
    return {
        f"{name}.{buffer}": module.kind
        for name, module in quantized_modules(model).items()
        for buffer, _ in module.named_buffers()
    }
