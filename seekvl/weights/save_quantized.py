"""A model quantised into a checkpoint folder, matrix by matrix; `read_quantized` says what stands in it."""

import json
import mmap
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from seekvl.models.quantized import Kind
from seekvl.models.vl2 import AnyVL
from seekvl.runtime import DTYPES, SeekVLError, atomic_file
from seekvl.weights.config import QUANT_VERSION, CheckpointConfig, quantization_section
from seekvl.weights.quantize import Matrix, Part, Progress, quantized_parts
from seekvl.weights.read import SINGLE, STORED, require_finite
from seekvl.weights.read_quantized import ALIGNMENT, METADATA
from seekvl.weights.save import config_files, old_files, write_config_files

HEADER_ENTRY = 800
"""Bytes of header that are kept free for a tensor: its place, and what is told of its matrix."""


def save_quantized(
    model: AnyVL,
    folder: Path,
    *,
    kind: Kind,
    config: CheckpointConfig,
    tokenizer: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    smallest: int | None = None,
    parts: Iterable[Part] | None = None,
    progress: Progress | None = None,
) -> tuple[Matrix, ...]:
    """Quantise a plain model matrix by matrix into a folder; return what became of each. The model stays as
    it is, and memory beside it is that of one matrix.

    parts: what becomes of each matrix, by default what `quantized_parts` with `smallest` and `progress` says;
    those of `calibrate.calibrated_parts` are chosen by what they do to answers.

    `config` is that of the loaded checkpoint; `tokenizer` a `tokenizer.json`; `dtype`, by default that of the
    weights, what is not packed is stored in. Raises SeekVLError as `quantized_parts` and `save_checkpoint`
    do.
    """
    if model.config != config.model:
        raise SeekVLError("the config given describes another model than the one to save")
    config = replace(config, layout="official", quantization=kind)
    dtype = dtype or model.language.norm.weight.dtype
    if parts is None:
        parts = quantized_parts(model, kind, smallest=smallest, progress=progress)
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        raise SeekVLError(f"weights are saved as {', '.join(DTYPES)}, not {dtype}")
    texts = config_files(config, tokenizer, dtype=names[dtype])
    texts["config.json"] = {**texts["config.json"], "quantization_config": quantization_section(kind)}
    old = old_files(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    with atomic_file(folder / SINGLE) as part:
        matrices = _write(model, part, kind=kind, dtype=dtype, parts=parts)
    for path in old:
        if path.name != SINGLE:
            path.unlink()
    write_config_files(folder, texts, tokenizer=tokenizer)
    return matrices


def _write(
    model: AnyVL, path: Path, *, kind: Kind, dtype: torch.dtype, parts: Iterable[Part]
) -> tuple[Matrix, ...]:
    """Write the file: the data behind a gap, and the header, known at the end only, into the gap."""
    room = (
        8 + HEADER_ENTRY * (len(model.state_dict()) + 10)
    ) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
    entries: dict[str, object] = {}
    matrices: list[Matrix] = []
    packed: set[str] = set()
    with path.open("wb") as file:
        file.seek(room)
        for matrix, part in parts:
            matrices.append(matrix)
            if part is not None:
                packed.add(matrix.name)
                for name, buffer in part.named_buffers():
                    entries[f"{matrix.name}.{name}"] = _append(file, buffer, start=room)
        for key, tensor in model.state_dict().items():
            module, _, name = key.rpartition(".")
            if module not in packed or name == "bias":
                stored = tensor.to(dtype)
                require_finite(stored, key=key, source=tensor)
                entries[key] = _append(file, stored, start=room)
        told = {matrix.name: {k: v for k, v in asdict(matrix).items() if k != "name"} for matrix in matrices}
        said = {"version": QUANT_VERSION, "format": kind, "matrices": told}
        header = json.dumps(
            {"__metadata__": {"format": "pt", METADATA: json.dumps(said)}, **entries}
        ).encode()
        assert len(header) <= room - 8, "the header outgrew its gap"
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + header.ljust(room - 8))
    return tuple(matrices)


def _append(file: BinaryIO, tensor: Tensor, *, start: int) -> dict[str, object]:
    """Write a tensor and return its entry of the header; packed ones come first and fill whole lines."""
    begin = file.tell() - start
    assert tensor.dtype != torch.uint8 or begin % ALIGNMENT == 0
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    (dtype,) = (name for name, value in STORED.items() if value == tensor.dtype)
    return {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, file.tell() - start]}
