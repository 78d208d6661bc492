"""Safetensors folders, single or sharded, streamed tensor by tensor into a network that has no memory yet.

The files are memory-mapped. A tensor that is already in the wanted dtype stays where it is, in the mapped
file, and costs neither a copy nor private memory (the map is private: training may write into it, the file
never changes). Any other is converted one at a time and its pages are handed back, so that the peak is the
weights plus one tensor. A mapped file must not be cut short while the model lives; replacing it, as
`save_checkpoint` does, is safe.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from seekvl.runtime import SeekVLError
from seekvl.weights.key_map import KeyMap, Shape, parameter_shapes
from seekvl.weights.section import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes that are weights; anything else in a file (integers, eight bits) is not a published
checkpoint.
"""

STORED = DTYPES | {"U8": torch.uint8}
"""Those of a quantised checkpoint: packed matrices are bytes."""

HEADER_LIMIT = 100_000_000
"""Longest header a safetensors file may have, bytes (format specification)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """As the file spells it: F32, BF16, …"""
    shape: Shape
    begin: int
    """First byte, counted from the start of the file."""
    end: int


def read_folder(folder: Path, *, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, StoredTensor]:
    """Return key -> place of every tensor in a checkpoint folder, after reading only headers and index.

    `dtypes` are those a tensor may have.

    Raises SeekVLError for missing, cut, garbled or pickled files, and where index and shards disagree.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise SeekVLError(f"{folder} has both {SINGLE} and {INDEX}: remove the one that does not belong")
    if single.exists():
        return read_header(single, dtypes=dtypes)
    if index.exists():
        return _read_shards(index, dtypes=dtypes)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        raise SeekVLError(
            f"{folder} has {', '.join(found[:3])} but neither {SINGLE} nor {INDEX}: download the rest"
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise SeekVLError(
            f"{folder} has pickled weights ({pickles[0]}), which can run code: convert them to safetensors"
        )
    raise SeekVLError(f"{folder} has no weights: {SINGLE}, or shards with {INDEX}, are expected")


def _read_shards(index: Path, *, dtypes: Mapping[str, torch.dtype]) -> dict[str, StoredTensor]:
    """Return the tensors of all shards, which must be exactly those of the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SeekVLError(f"{index} has no weight_map: download it again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise SeekVLError(f"{index}: {key} points to {name!r}, which is no shard beside the index")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).exists():
            count = sum(shard == name for shard in weight_map.values())
            raise SeekVLError(
                f"shard {name} is missing in {index.parent}: the index places {count} tensors in it"
            )
        for key, tensor in read_header(index.parent / name, dtypes=dtypes).items():
            if key in tensors:
                raise SeekVLError(f"tensor {key} stands twice: in {tensors[key].file.name} and in {name}")
            if weight_map.get(key) != name:
                place = f"places it in {weight_map[key]}" if key in weight_map else "does not have it"
                raise SeekVLError(f"tensor {key} stands in {name}, but {index.name} {place}")
            tensors[key] = tensor
    absent = [key for key in weight_map if key not in tensors]
    if absent:
        raise SeekVLError(
            f"{index.name} places {_some(absent)} in {weight_map[absent[0]]}, which does not have it"
        )
    return tensors


def read_header(path: Path, *, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, StoredTensor]:
    """Return key -> place of the tensors in one safetensors file, checked against the length of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            what = (
                "is empty"
                if size == 0
                else f"is cut short or no safetensors file ({size} bytes, header of {length})"
            )
            raise SeekVLError(f"{path} {what}: download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SeekVLError(f"{path} has a garbled header: download it again") from error
    except _DuplicateError as error:
        raise SeekVLError(f"{path}: tensor {error} stands twice in the header") from error
    if not isinstance(header, dict):
        raise SeekVLError(f"{path} has a garbled header: download it again")
    header.pop("__metadata__", None)
    tensors = {
        key: _stored(path, key, value, start=8 + length, dtypes=dtypes) for key, value in header.items()
    }
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        what = "is cut short" if size < end else "has bytes behind its last tensor"
        raise SeekVLError(f"{path} {what}: {size} bytes instead of {end}; download it again")
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise SeekVLError(
                f"{path} has a garbled header: its tensors overlap or leave gaps at byte {position}"
            )
        position = tensor.end
    return tensors


class _DuplicateError(Exception):
    """A JSON object names a key twice; the argument is the key."""


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object, refusing a second value for a key."""
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateError(key)
        values[key] = value
    return values


def _stored(
    path: Path, key: str, value: object, *, start: int, dtypes: Mapping[str, torch.dtype]
) -> StoredTensor:
    """Turn one header entry into a place, checking that bytes, shape and dtype fit."""
    try:
        if not isinstance(value, dict):
            raise TypeError(f"{type(value).__name__} instead of an object")
        dtype, shape = value["dtype"], tuple(int(side) for side in value["shape"])
        first, last = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SeekVLError(f"{path}: the header entry of {key!r} is garbled: download it again") from error
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise SeekVLError(f"{path}: tensor {key} is stored as {dtype}; weights are {', '.join(dtypes)}")
    expected = math.prod(shape) * dtypes[dtype].itemsize
    if first < 0 or last - first != expected or any(side < 1 for side in shape):
        raise SeekVLError(
            f"{path}: tensor {key} of shape {list(shape)} as {dtype} cannot lie in {last - first} bytes"
        )
    return StoredTensor(file=path, dtype=dtype, shape=shape, begin=start + first, end=start + last)


def match(
    tensors: Mapping[str, StoredTensor], *, key_map: KeyMap, shapes: Mapping[str, Shape]
) -> dict[str, StoredTensor]:
    """Return published key -> place for exactly the keys of the map.

    `shapes` are those of our parameters. Raises SeekVLError that names missing, surplus and misshaped
    tensors.
    """
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = key_map.canonical(key)
        if name in found:
            raise SeekVLError(
                f"tensor {name} stands twice in the checkpoint, once as {key}: keep one of them"
            )
        found[name] = tensor
    wanted = {key: target.shape(shapes[target.parameter]) for key, target in key_map.targets.items()}
    missing = [key for key in wanted if key not in found]
    surplus = [key for key in found if key not in wanted and key not in key_map.unused]
    expected = wanted | {key: shape for key, shape in key_map.unused.items() if shape is not None}
    misshaped = [
        f"{key} {list(tensor.shape)} instead of {list(expected[key])}"
        for key, tensor in found.items()
        if key in expected and tensor.shape != expected[key]
    ]
    parts = [("missing", missing), ("not known", surplus), ("of another shape", misshaped)]
    faults = "; ".join(f"{len(names)} tensors {what}: {_some(names)}" for what, names in parts if names)
    if faults:
        hint = "" if len(missing) < len(wanted) else ": these are not the weights of this config.json"
        raise SeekVLError(f"the weights do not fit the {key_map.layout} layout: {faults}{hint}")
    return {key: found[key] for key in wanted}


def load_tensors(
    model: nn.Module,
    folder: Path,
    *,
    key_map: KeyMap,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill a network built on the meta device with the weights of a folder, in this dtype and on this device.

    Raises SeekVLError before anything is read when the keys do not fit, and for weights that are not finite.
    """
    shapes = parameter_shapes(model)
    places = match(read_folder(folder), key_map=key_map, shapes=shapes)
    by_row = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)}
    maps: dict[Path, mmap.mmap] = {}
    state: dict[str, Tensor] = {}
    for key, place in sorted(places.items(), key=lambda item: (str(item[1].file), item[1].begin)):
        target = key_map.targets[key]
        if place.file not in maps:
            maps[place.file] = map_file(place.file)
        source = mapped(maps[place.file], place)
        if target.operation == "copy":
            filled = source.to(device=device, dtype=dtype)
            state[target.parameter] = filled
        else:
            if target.parameter not in state:
                state[target.parameter] = torch.empty(shapes[target.parameter], dtype=dtype, device=device)
            filled = target.of(state[target.parameter]).copy_(source)
        require_finite(filled, key=key, source=source)
        if filled is not source or target.parameter in by_row:
            _drop_pages(maps[place.file], place)
    fill(model, state)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network its tensors as parameters without gradients, and as buffers; `state` has exactly what
    it lacks. `load_state_dict` does so, and takes four times as long.
    """
    for prefix, module in model.named_modules():
        for own, made in ((module._parameters, _weight), (module._buffers, Tensor.detach)):
            for key, empty in own.items():
                if empty is not None:
                    own[key] = made(state[f"{prefix}.{key}" if prefix else key])


def _weight(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that does not learn."""
    return nn.Parameter(tensor, requires_grad=False)


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, privately: what is written into the map never reaches the file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def mapped(pages: mmap.mmap, place: StoredTensor) -> Tensor:
    """Return a tensor that lies in mapped pages, without reading it; one that is not aligned is copied."""
    dtype = STORED[place.dtype]
    if place.begin % dtype.itemsize:
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=place.end - place.begin, offset=place.begin)
        return raw.clone().view(dtype).view(place.shape)
    flat = torch.frombuffer(pages, dtype=dtype, count=math.prod(place.shape), offset=place.begin)
    return flat.view(place.shape)


def _drop_pages(pages: mmap.mmap, place: StoredTensor) -> None:
    """Hand back the memory of the whole pages under a tensor; the file still has them, and what is read again
    comes back.

    Of what was copied they are not needed any more, of an embedding only rows that occur in prompts. Other
    weights are read whole, and soon: they stay.
    """
    begin = -(-place.begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = place.end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def require_finite(filled: Tensor, *, key: str, source: Tensor) -> None:
    """Raise SeekVLError when a tensor holds NaN or infinity, also one that appeared in the conversion.

    The sum tells in one fast pass, as NaN and infinity spread into it; where large values overflow it,
    smallest and largest value decide.
    """
    if math.isfinite(filled.sum().item()):
        return
    low, high = filled.aminmax()
    if math.isfinite(low.item()) and math.isfinite(high.item()):
        return
    bad = int((~source.isfinite()).sum())
    if bad:
        raise SeekVLError(
            f"tensor {key} has {bad} values that are NaN or infinite: the file is damaged or training "
            "diverged"
        )
    raise SeekVLError(f"tensor {key} does not fit into {filled.dtype}: use bfloat16 or float32")


def _some(names: Iterable[str]) -> str:
    """List up to three names and count the rest."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
