"""Is this installation right, and is this checkpoint folder whole? One line for each thing looked at.

The self-check runs a published-layout miniature of the 7B that ships with the package, random weights and
all, and compares with what the reference code computes from it: prompt, ids, pixels, features, logits, greedy
ids.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from seekvl.models.hybrid import Hybrid
from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyConfig, AnyVL, VL2Config, on_meta
from seekvl.processing.conversation import Conversation, Message, Picture, Text
from seekvl.processing.encode import ModelInput, Processor
from seekvl.runtime import SeekVLError
from seekvl.weights.config import CheckpointConfig, read_config
from seekvl.weights.key_map import parameter_shapes
from seekvl.weights.load import Checkpoint, find_folder, layout_map, load_checkpoint, load_tokenizer
from seekvl.weights.read import DTYPES, map_file, mapped, match, read_folder, require_finite
from seekvl.weights.section import read_json

T = TypeVar("T")

SELFCHECK = Path(__file__).parent / "selfcheck"

FEATURES = 3e-5
"""Largest difference of a vision feature in float32 that still counts as equal."""

LOGITS = 1e-4
"""Largest difference of a logit in float32 that still counts as equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    detail: str
    """What was found, in one line; what to do where it is not ok."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything looked at, in order; what needs a failed check's result is not reached and not listed."""

    title: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        """Return a line for each check."""
        words = {True: "ok    ", False: "FAILED"}
        return [f"{words[check.ok]} {check.name}: {check.detail}" for check in self.checks]


class _Checks:
    """Runs checks one after the other and remembers what came out."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    def run(self, name: str, look: Callable[[], tuple[T, str]]) -> T | None:
        """Run one check that returns its result and a line; None after a failure."""
        try:
            result, detail = look()
        except SeekVLError as error:
            self.done.append(Check(name=name, ok=False, detail=str(error)))
            return None
        self.done.append(Check(name=name, ok=True, detail=detail))
        return result


def self_check() -> Report:
    """Compare this installation with the reference, on a model that ships for this (CPU, float32)."""
    checks = _Checks()
    checkpoint = checks.run("weights", _load_selfcheck)
    if checkpoint is not None:
        expected = load_file(SELFCHECK / "expected.safetensors")
        for case in ("single_zh", "text_only"):
            _run_case(checks, checkpoint, case=case, expected=expected)
    return Report(title="self-check", checks=tuple(checks.done))


def _load_selfcheck() -> tuple[Checkpoint, str]:
    """Load the miniature."""
    checkpoint = load_checkpoint(SELFCHECK, device="cpu", dtype="float32", preprocessing="official")
    count = len(parameter_shapes(checkpoint.model))
    return checkpoint, f"{count} parameters filled from {len(read_folder(SELFCHECK))} published tensors"


def _run_case(checks: _Checks, checkpoint: Checkpoint, *, case: str, expected: Mapping[str, Tensor]) -> None:
    """Check one conversation from its words to the ids generated."""
    said = read_json(SELFCHECK / "expected.json")[case]
    assert isinstance(said, dict)
    inputs = checks.run(f"{case}, prompt", lambda: _prompt(checkpoint, said, expected[f"{case}/input_ids"]))
    if inputs is None:
        return
    model = checkpoint.model
    features = None
    if inputs.pixels is not None:
        checks.run(f"{case}, pixels", lambda: _pixels(inputs, said["pixels_sha256"]))
        features = checks.run(f"{case}, vision", lambda: _vision(model, inputs, case=case, expected=expected))
        if features is None:
            return
    embeds = model.embed(inputs.input_ids[None], image_mask=inputs.image_mask[None], image_features=features)
    checks.run(f"{case}, logits", lambda: _logits(model, embeds, expected[f"{case}/logits_last"]))
    checks.run(f"{case}, greedy", lambda: _greedy(model, embeds, expected[f"{case}/generated_ids"]))


def _prompt(checkpoint: Checkpoint, said: Mapping[str, object], ids: Tensor) -> tuple[ModelInput, str]:
    """Encode the conversation and compare prompt and ids."""
    conversation = said["conversation"]
    assert isinstance(conversation, list)
    turns = [
        turn | {"images": [str(SELFCHECK / name) for name in turn.get("images", ())]} for turn in conversation
    ]
    inputs = checkpoint.processor(turns)
    if inputs.prompt != said["prompt"]:
        raise SeekVLError(f"the prompt is {inputs.prompt!r} instead of {said['prompt']!r}")
    if not torch.equal(inputs.input_ids, ids.flatten()):
        raise SeekVLError(f"the {inputs.input_ids.numel()} token ids differ from the {ids.numel()} expected")
    return inputs, f"{ids.numel()} token ids equal"


def _pixels(inputs: ModelInput, digest: str) -> tuple[None, str]:
    """Compare the pixels bit for bit."""
    assert inputs.pixels is not None
    found = hashlib.sha256(inputs.pixels[0].numpy().tobytes()).hexdigest()
    if found != digest:
        raise SeekVLError("the pixels differ from the reference's: another Pillow may resize differently")
    return None, "equal bit for bit"


def _vision(
    model: AnyVL, inputs: ModelInput, *, case: str, expected: Mapping[str, Tensor]
) -> tuple[Tensor, str]:
    """Run the towers and compare the features of every fifth place."""
    assert inputs.pixels is not None
    assert isinstance(model, VL)
    assert isinstance(model.vision, Hybrid)
    high, low = model.vision(inputs.pixels)
    worst = max(
        _difference(high[:, ::5], expected[f"{case}/vision_features_high_every_5th"]),
        _difference(low[:, ::5], expected[f"{case}/vision_features_low_every_5th"]),
    )
    return model.adaptor((high, low)), _within(worst, FEATURES)


def _logits(model: AnyVL, embeds: Tensor, expected: Tensor) -> tuple[None, str]:
    """Compare the logits of the last position."""
    logits = model.head(model.hidden(embeds)[:, -1])
    return None, _within(_difference(logits, expected), LOGITS)


def _greedy(model: AnyVL, embeds: Tensor, expected: Tensor) -> tuple[None, str]:
    """Compare greedy ids, each found with a full pass: slow, obvious, and without a cache."""
    wanted = expected.flatten().tolist()
    found: list[int] = []
    for _ in wanted:
        token = model.head(model.hidden(embeds)[:, -1]).argmax(-1)
        found.append(int(token))
        embeds = torch.cat((embeds, model.language.embed_tokens(token)[:, None]), dim=1)
    if found != wanted:
        raise SeekVLError(f"greedy ids are {found} instead of {wanted}")
    return None, f"{len(wanted)} ids equal"


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; NaN where there is one."""
    return float((found - expected).abs().max())


def _within(difference: float, limit: float) -> str:
    """Say how large a difference is, or raise SeekVLError when it is too large or not a number."""
    if not difference <= limit:
        raise SeekVLError(f"differs by {difference:.1e} from the reference, at most {limit:.0e} is allowed")
    return f"largest difference {difference:.1e} (at most {limit:.0e})"


def verify_folder(name: str | Path) -> Report:
    """Look at everything in a checkpoint folder that can be judged without running the network."""
    checks = _Checks()
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


def _weights(checks: _Checks, folder: Path, config: CheckpointConfig) -> None:
    """Look at the weight files: headers, keys and shapes, dtypes, numbers."""

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
    """Compare the stored dtypes with what the config says."""
    counts = Counter(dtypes.values())
    found = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    if config.dtype is not None and {DTYPES[dtype] for dtype in counts} != {config.dtype}:
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
