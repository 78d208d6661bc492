"""Is this checkpoint folder whole? One line for each thing that can be judged without running the network."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from seekvl.models.vl2 import AnyConfig, VL2Config, on_meta
from seekvl.processing.conversation import Conversation, Message, Picture, Text
from seekvl.processing.encode import Processor
from seekvl.runtime import SeekVLError
from seekvl.weights.config import CheckpointConfig, read_config
from seekvl.weights.key_map import parameter_shapes
from seekvl.weights.load import find_folder, layout_map, load_model, load_tokenizer
from seekvl.weights.quantize import summary
from seekvl.weights.read import DTYPES, map_file, mapped, match, read_folder, require_finite
from seekvl.weights.read_quantized import check_numbers, stored_matrices
from seekvl.weights.report import Checks, Report


def verify_folder(name: str | Path) -> Report:
    """Look at everything in a checkpoint folder but what its network computes."""
    checks = Checks()
    folder = checks.run("folder", lambda: _folder(name))
    if folder is not None:
        config = checks.run("config", lambda: _config(folder))
        if config is not None:
            _weights(checks, folder, config)
            processor = checks.run("tokenizer", lambda: _tokenizer(folder, config))
            if processor is not None:
                checks.run("template", lambda: _template(processor))
    return Report(title=str(name), checks=tuple(checks.done))


def _folder(name: str | Path) -> tuple[Path, str]:
    """Find the folder."""
    folder = find_folder(name)
    return folder, str(folder)


def _config(folder: Path) -> tuple[CheckpointConfig, str]:
    """Read the config files."""
    config = read_config(folder)
    numbers = sum(math.prod(shape) for shape in parameter_shapes(on_meta(config.model)).values())
    return config, (
        f"{config.layout} layout, {numbers:,} parameters in use, {_pictures(config.model)}, context "
        f"{config.max_tokens} tokens"
    )


def _pictures(model: AnyConfig) -> str:
    """Say what a picture costs."""
    if not isinstance(model, VL2Config):
        return f"pictures of {model.image_size} px as {model.visual_tokens} tokens"
    return f"pictures in tiles of {model.image_size} px, at least {model.slots((1, 1))} tokens"


def _quantized(folder: Path, config: CheckpointConfig) -> tuple[None, str]:
    """Load a quantised folder, which looks at names, shapes and dtypes, look at its numbers, and count its
    matrices.
    """
    check_numbers(load_model(folder, config=config, device="cpu"))
    counts = summary(stored_matrices(folder, kind=config.quantization))
    return None, ", ".join(f"{count} modules {what}" for what, count in counts.items())


def _weights(checks: Checks, folder: Path, config: CheckpointConfig) -> None:
    """Look at the weight files: headers, keys and shapes, dtypes, numbers."""
    if config.quantization is not None:
        checks.run("quantised weights", lambda: _quantized(folder, config))
        return

    def files() -> tuple[dict[str, str], str]:
        """Read headers and index."""
        tensors = read_folder(folder)
        size = sum(tensor.end - tensor.begin for tensor in tensors.values())
        paths = {tensor.file for tensor in tensors.values()}
        return {key: tensor.dtype for key, tensor in tensors.items()}, (
            f"{len(tensors)} tensors, {size:,} bytes in {len(paths)} files"
        )

    dtypes = checks.run("files", files)
    if dtypes is None:
        return
    checks.run("keys", lambda: _keys(folder, config))
    checks.run("dtypes", lambda: _dtypes(dtypes, config))
    checks.run("numbers", lambda: _numbers(folder, config))


def _keys(folder: Path, config: CheckpointConfig) -> tuple[None, str]:
    """Match the keys and shapes with the network."""
    tensors = read_folder(folder)
    used = match(tensors, key_map=layout_map(config), shapes=parameter_shapes(on_meta(config.model)))
    return None, f"{len(used)} tensors used, {len(tensors) - len(used)} known to be unused"


def _dtypes(dtypes: Mapping[str, str], config: CheckpointConfig) -> tuple[None, str]:
    """Compare the dtype most tensors are stored in with what the config says; a few may have a finer one."""
    counts = Counter(dtypes.values())
    found = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    (main, _), *_ = counts.most_common()
    if config.dtype is not None and DTYPES[main] != config.dtype:
        raise SeekVLError(
            f"the tensors are {found}, but config.json says {config.dtype}".replace("torch.", "")
        )
    return None, found


def _numbers(folder: Path, config: CheckpointConfig) -> tuple[None, str]:
    """Look at every number once; embedding and head must be two matrices, as published."""
    tensors = read_folder(folder)
    for path in sorted({tensor.file for tensor in tensors.values()}):
        pages = map_file(path)
        for key, tensor in tensors.items():
            if tensor.file == path:
                values = mapped(pages, tensor)
                require_finite(values, key=key, source=values)
    ends = []
    for key, target in layout_map(config).targets.items():
        if target.parameter in ("language.embed_tokens.weight", "language.lm_head.weight") and key in tensors:
            ends.append(mapped(map_file(tensors[key].file), tensors[key]))
    if len(ends) == 2 and torch.equal(*ends):
        raise SeekVLError("embedding and head are equal: a tool has tied them; published weights are untied")
    return None, f"all finite in {len(tensors)} tensors; embedding and head are two matrices"


def _tokenizer(folder: Path, config: CheckpointConfig) -> tuple[Processor, str]:
    """Load the tokenizer and find its specials."""
    tokenizer = load_tokenizer(folder, config)
    processor = Processor(
        tokenizer, config.image, config.template, max_tokens=config.model.language.max_positions
    )
    return processor, (
        f"{tokenizer.vocab_size} entries for {config.model.language.vocab_size} rows, begin "
        f"{tokenizer.bos_id}, "
        f"end {tokenizer.eos_id}, pad {tokenizer.pad_id}, picture {tokenizer.image_id}"
    )


def _template(processor: Processor) -> tuple[None, str]:
    """Encode two turns with a picture and see the control tokens where they belong, and nowhere else."""
    tokenizer, template = processor.tokenizer, processor.template
    words = f"A {template.separators[1]} and a {template.picture} in the text."
    turns = (
        Message(role="user", parts=(Picture(source=Image.new("RGB", (40, 30))), Text(text=words))),
        Message(role="assistant", parts=(Text(text="Yes."),)),
        Message(role="user", parts=(Text(text="好，谢谢 🙂"),)),
    )
    inputs = processor.encode(Conversation(messages=turns))
    ids = inputs.input_ids.tolist()
    counts = {
        "begin": (ids.count(tokenizer.bos_id), 1),
        "end": (ids.count(tokenizer.eos_id), 1),
        "picture": (ids.count(tokenizer.image_id), sum(inputs.bill.image_tokens)),
    }
    for name, (found, wanted) in counts.items():
        if found != wanted:
            raise SeekVLError(f"two turns and a picture have {found} {name} tokens instead of {wanted}")
    if ids[0] != tokenizer.bos_id:
        raise SeekVLError(f"a prompt starts with token {ids[0]} instead of {tokenizer.bos_id}")
    unprinted = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id}
    text = tokenizer.decode([token for token in ids if token not in unprinted], skip_specials=False)
    plain = inputs.prompt.replace(template.picture, "", 1)
    if template.role_tokens:  # the space in front of an answer is printed, not fed
        plain = plain.replace(f"{template.assistant}: ", f"{template.assistant}:")
    head, _, tail = plain.rpartition(template.separators[1])
    if text != head + tail:
        raise SeekVLError(
            "the prompt does not survive encoding and decoding: this tokenizer loses characters"
        )
    return None, f"{len(ids)} tokens for two turns and a picture; the text comes back unchanged"
