"""From a name or a folder to a network with its processor, ready to use."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from seekvl.models.quantized import KINDS, Kind
from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import AnyVL, on_meta
from seekvl.presets import SHORT_NAMES
from seekvl.processing.choices import Preprocessing
from seekvl.processing.encode import Processor
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import SeekVLError, is_whole, select_device, select_dtype
from seekvl.weights.config import CheckpointConfig, read_config
from seekvl.weights.key_map import KeyMap
from seekvl.weights.official import official_map
from seekvl.weights.official_vl2 import vl2_map
from seekvl.weights.quantize import Progress, quantize_model
from seekvl.weights.read import load_tensors
from seekvl.weights.read_quantized import load_quantized
from seekvl.weights.transformers_layout import transformers_map
from seekvl.weights.weight_only import GpuKind, gpu_kind, quantize_on_gpu

NANO, NANO_MOE = "seekvl-nano", "seekvl-nano-moe"

BUNDLED = {name: Path(__file__).parent / folder for name, folder in ((NANO, "nano"), (NANO_MOE, "nano_moe"))}
"""Models that ship with the package, by name: one of each family, the first is the default."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

DOWNLOADED = ["*.json", "*.safetensors"]
"""What is fetched from the hub: never code, never pickles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A loaded checkpoint."""

    model: AnyVL
    """In evaluation mode, without gradients."""
    processor: Processor
    config: CheckpointConfig
    folder: Path
    name: str
    """As it was asked for."""


def load_checkpoint(
    name: str | Path = NANO,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    preprocessing: Preprocessing = "seekvl",
    revision: str | None = None,
    max_tokens: int | None = None,
    max_tiles: int | None = None,
    quantize: str | None = None,
    smallest: int | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Load a checkpoint of either layout: a bundled model, a folder, or a hub id.

    `quantize` turns the matrices of a plain checkpoint into "int8" or "int4" on the way in (see
    `weights.quantize`, for `smallest`, too; on a GPU also into "fp8", see `weights.weight_only`), and
    `progress` is told how far that is; a folder that `save_quantized` wrote needs neither.

    `max_tokens` bounds a prompt: by default the 4,096 tokens the checkpoints were trained on, at most the
    positions they have. `max_tiles` bounds the tiles of a picture in DeepSeek-VL2; None takes its rule.
    Everything is checked before the weights are read, and the weights before anything is computed.
    """
    folder = find_folder(name, revision=revision)
    config = read_config(folder)
    on_gpu = _gpu_format(config, quantize, device=device)
    kind = choose_format(config, quantize, device=device) if on_gpu is None else None
    processor = load_processor(
        folder, config, preprocessing=preprocessing, max_tokens=max_tokens, max_tiles=max_tiles
    )
    model = load_model(folder, config=config, device="cpu" if kind else device, dtype=dtype)
    if on_gpu is not None:
        quantize_on_gpu(model, on_gpu, progress=progress)
    elif kind is not None and config.quantization is None:
        quantize_model(model, kind, smallest=smallest, progress=progress)
    return Checkpoint(
        model=model,
        processor=processor,
        config=config,
        folder=folder,
        name=str(name),
    )


def load_processor(
    folder: Path,
    config: CheckpointConfig,
    *,
    preprocessing: Preprocessing = "seekvl",
    max_tokens: int | None = None,
    max_tiles: int | None = None,
) -> Processor:
    """Load what turns conversations into model input, without the network; see `load_checkpoint`."""
    limit = _limit(config, max_tokens)
    return Processor(
        load_tokenizer(folder, config),
        config.image,
        config.template,
        preprocessing=preprocessing,
        max_tokens=limit,
        max_tiles=max_tiles,
    )


def load_model(
    folder: Path,
    *,
    config: CheckpointConfig,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> AnyVL:
    """Load the network alone, in evaluation mode and without gradients."""
    model = on_meta(config.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    place = select_device(device)
    if config.quantization is not None:
        load_quantized(
            model,
            folder,
            kind=config.quantization,
            dtype=select_dtype(dtype, device=place, parameters=parameters),
            device=place,
        )
        return model.eval().requires_grad_(False)
    load_tensors(
        model,
        folder,
        key_map=layout_map(config),
        dtype=select_dtype(dtype, device=place, parameters=parameters),
        device=place,
    )
    return model.eval().requires_grad_(False)


def _gpu_format(config: CheckpointConfig, wish: str | None, *, device: str | torch.device) -> GpuKind | None:
    """Return the format that a GPU shall give a plain model; None without one, and where a CPU computes."""
    if wish is None or config.quantization is not None:
        return None
    if select_device(device).type == "cuda":
        return gpu_kind(wish)
    if wish == "fp8":
        raise SeekVLError("fp8 is a format of GPUs; a CPU has " + " and ".join(KINDS))
    return None


def choose_format(config: CheckpointConfig, wish: str | None, *, device: str | torch.device) -> Kind | None:
    """Return the format a model shall have; None leaves it plain.

    Raises SeekVLError for a format that does not exist or is another than the folder's, and for a device that
    has no kernels for it.
    """
    if wish is not None and wish not in KINDS:
        raise SeekVLError(f"quantize={wish!r} is unknown; use {' or '.join(KINDS)}, or None")
    if None not in (wish, config.quantization) and wish != config.quantization:
        raise SeekVLError(
            f"quantize={wish!r} was asked for, but this checkpoint is stored as {config.quantization}; load "
            "it as it is, or quantise the one it was made from"
        )
    kind = next((known for known in KINDS if known == (wish or config.quantization)), None)
    if kind is not None and str(device).partition(":")[0] not in ("auto", "cpu"):
        raise SeekVLError(
            f"{kind} in the format of the kernels is computed on the CPU alone, not on {device}: use "
            "device='cpu', or load a plain checkpoint on the GPU, where quantize= takes torchao's formats"
        )
    return kind


def layout_map(config: CheckpointConfig) -> KeyMap:
    """Return the key map of a checkpoint's layout.

    Raises SeekVLError for DeepSeek-VL2 in the transformers layout, which does not have it.
    """
    if isinstance(config.model, VLConfig):
        return official_map(config.model) if config.layout == "official" else transformers_map(config.model)
    if config.layout != "official":
        raise SeekVLError("the transformers layout has no DeepSeek-VL2; use the official layout")
    return vl2_map(config.model)


def load_tokenizer(folder: Path, config: CheckpointConfig) -> Tokenizer:
    """Load the tokenizer of a checkpoint and compare its ids with the network.

    Raises SeekVLError when a special is missing, an id has no embedding row, or the config names another
    image token.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise SeekVLError(f"{folder} has no tokenizer.json: download the whole checkpoint folder")
    return open_tokenizer(path, config)


def open_tokenizer(path: Path, config: CheckpointConfig) -> Tokenizer:
    """Open a `tokenizer.json` for the network of this config, with the same errors."""
    specials = config.specials
    tokenizer = Tokenizer.from_file(
        path,
        bos=specials.bos,
        eos=specials.eos,
        image=specials.image,
        pad=specials.pad,
        added=specials.added,
    )
    rows = config.model.language.vocab_size
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.pad_id)
    highest = max(tokenizer.vocab_size - 1, *ids)
    if highest >= rows:
        raise SeekVLError(
            f"{path}: token ids go up to {highest}, but the model has {rows} embedding rows: "
            "they belong to two checkpoints"
        )
    if config.image_id is not None and config.image_id != tokenizer.image_id:
        raise SeekVLError(
            f"{path}: {specials.image} has id {tokenizer.image_id}, "
            f"but config.json says image_token_id {config.image_id}"
        )
    return tokenizer


def find_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, after downloading it where the name is a hub id.

    What looks like a path and is none is an error, never a download.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise SeekVLError(
            f"a model is named by a folder, a hub id or one of {', '.join(BUNDLED)}, not {name!r}"
        )
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    bundled = str(name) in BUNDLED and (isinstance(name, str) or not os.path.isdir(path))
    if bundled or os.path.isdir(path):  # unlike Path.is_dir, it is no error for what is too long for a name
        if revision is not None:
            what = f"bundled {name}" if bundled else f"folder {path}"
            raise SeekVLError(f"revision {revision!r} was given for the {what}, which has only one")
        return _bundled(str(name)) if bundled else path
    if os.path.exists(path):
        raise SeekVLError(f"{path} is a file; give the folder that holds config.json and the weights")
    text = SHORT_NAMES.get(str(name), str(name))
    if isinstance(name, Path) or not HUB_ID.fullmatch(text) or os.path.exists(Path(text).parent):
        known = ", ".join([*BUNDLED, *SHORT_NAMES])
        shown = str(name) if len(str(name)) <= 120 else f"{str(name)[:100]}..."
        raise SeekVLError(
            f"there is no folder {shown!r}; give an existing folder, a hub id org/name, or one of {known}"
        )
    return _download(text, revision=revision)


def _bundled(name: str) -> Path:
    """Return the folder of a model that ships with the package, or say how to come by it."""
    folder = BUNDLED[name]
    if not (folder / "config.json").exists():
        verb = name.removeprefix("seekvl-")
        raise SeekVLError(
            f"{name} is not in this installation ({folder}): reinstall seekvl, or make it with "
            f"'seekvl train {verb} --out DIR' and give the folder DIR/{name}"
        )
    return folder


def _download(repository: str, *, revision: str | None) -> Path:
    """Fetch a repository's weights and JSON files into the hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=DOWNLOADED))
    except GatedRepoError as error:
        raise SeekVLError(f"{repository} asks for a login: accept its terms on the hub and log in") from error
    except RepositoryNotFoundError as error:
        raise SeekVLError(f"the hub has no {repository} (or it is private): check the name") from error
    except RevisionNotFoundError as error:
        raise SeekVLError(f"{repository} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise SeekVLError(
            f"{repository} is not in the local hub cache and the hub cannot be reached: go online or give a "
            "folder"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SeekVLError(f"{repository} cannot be downloaded: {reason}") from error


def _limit(config: CheckpointConfig, max_tokens: int | None) -> int:
    """Return the bound on a prompt, tokens."""
    if max_tokens is None:
        return config.max_tokens
    positions = config.model.language.max_positions
    if not is_whole(max_tokens) or not 1 <= max_tokens <= positions:
        raise SeekVLError(
            f"max_tokens {max_tokens!r} is no whole number of 1..{positions}, the positions this model has"
        )
    return max_tokens
