"""Does this installation compute what the reference computes? Golden vectors that travel with the package.

    vl1-hybrid        DeepSeek-VL with both towers: prompt, pixels, features, logits, greedy ids
    vl2-small-like    DeepSeek-VL2 with latent attention and experts: prompt, tiles, rows, logits, greedy ids
    vl2-base-like     latent attention, and the router with biases in groups of experts (noaux_tc)
    vl2-tiny-like     plain heads, and the router that takes the largest shares
    grounding         answers, and the boxes that the reference reads in them

The first two are whole checkpoints in miniature, in the published layout, with random weights; of the next
two there is what the others lack, attention and router of one layer. Everything runs on the CPU in float32.

Letters: t tokens, k experts a token, d width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from seekvl.models.deepseek_v2 import DeepseekV2Config, Layer
from seekvl.models.hybrid import Hybrid
from seekvl.models.llama import rotary_table
from seekvl.models.moe import Moe
from seekvl.models.vl import VL
from seekvl.models.vl2 import AnyVL, VL2Config, on_meta
from seekvl.processing.encode import ModelInput
from seekvl.processing.grounding import parse_boxes
from seekvl.runtime import SeekVLError
from seekvl.weights.config import CheckpointConfig, read_config
from seekvl.weights.key_map import parameter_shapes
from seekvl.weights.load import Checkpoint, layout_map, load_checkpoint
from seekvl.weights.read import read_folder
from seekvl.weights.report import Checks, Report
from seekvl.weights.section import Section

SELFCHECK = Path(__file__).parent / "selfcheck"

MINIATURES = {"vl1-hybrid": ("single_zh", "text_only"), "vl2-small-like": ("two", "grounding_turns")}
"""Folder of a whole checkpoint -> the conversations it is asked."""

ROUTERS = ("vl2-base-like", "vl2-tiny-like")
"""Folders of attention and router of one layer."""

LAYER = 1
"""Which layer that is: the first with experts."""

FEATURES = 3e-5
"""Largest difference of a vision feature in float32 that still counts as equal."""

LOGITS = 1e-4
"""Largest difference of a logit in float32 that still counts as equal."""

WEIGHTS = 1e-5
"""Largest difference of an expert's weight that still counts as equal; attention comes before the router."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One conversation with a miniature, and what the reference computes from it."""

    name: str
    label: str
    """Name with that of the miniature, for the report."""
    said: Section
    """Conversation, prompt and digest of the pixels."""
    values: Mapping[str, Tensor]
    """Tensors of all conversations with the miniature, as case/tensor."""

    def value(self, key: str) -> Tensor:
        """Return a tensor of this conversation."""
        return _value(self.values, f"{self.name}/{key}")


def self_check() -> Report:
    """Compare this installation with the reference, on what ships with it for this."""
    checks = Checks()
    for name, cases in MINIATURES.items():
        _miniature(checks, name, cases)
    for name in ROUTERS:
        checks.run(f"{name}, attention and router", partial(_router, SELFCHECK / name))
    checks.run("grounding, boxes", _boxes)
    return Report(title="self-check", checks=tuple(checks.done))


def _miniature(checks: Checks, name: str, cases: tuple[str, ...]) -> None:
    """Load a miniature and ask it."""
    checkpoint = checks.run(f"{name}, weights", lambda: _load(SELFCHECK / name))
    vectors = checks.run(f"{name}, vectors", lambda: _vectors(SELFCHECK / name, cases))
    if checkpoint is not None and vectors is not None:
        for case in vectors:
            _run_case(checks, checkpoint, case)


def _load(folder: Path) -> tuple[Checkpoint, str]:
    """Load a miniature."""
    checkpoint = load_checkpoint(folder, device="cpu", dtype="float32", preprocessing="official")
    count = len(parameter_shapes(checkpoint.model))
    return checkpoint, f"{count} parameters filled from {len(read_folder(folder))} published tensors"


def _vectors(folder: Path, cases: tuple[str, ...]) -> tuple[list[Case], str]:
    """Read what the reference computed."""
    said, values = Section.of_file(folder / "expected.json"), _tensors(folder / "expected.safetensors")
    found = [
        Case(name=case, label=f"{folder.name} {case}", said=said.section(case), values=values)
        for case in cases
    ]
    return found, f"{len(values)} tensors of {len(found)} conversations"


def _run_case(checks: Checks, checkpoint: Checkpoint, case: Case) -> None:
    """Check one conversation from its words to the ids generated."""
    model = checkpoint.model
    inputs = checks.run(f"{case.label}, prompt", lambda: _prompt(checkpoint, case))
    if inputs is None:
        return
    features = None
    if inputs.pixels is not None:
        what = "pixels" if inputs.grids is None else "tiles"
        checks.run(f"{case.label}, {what}", lambda: _pixels(inputs, case))
        features = checks.run(f"{case.label}, vision", lambda: _vision(model, inputs, case))
        if features is None:
            return
    embeds = checks.run(f"{case.label}, logits", lambda: _logits(model, inputs, features, case))
    if embeds is not None:
        checks.run(f"{case.label}, greedy", lambda: _greedy(model, embeds, case.value("generated_ids")))


def _prompt(checkpoint: Checkpoint, case: Case) -> tuple[ModelInput, str]:
    """Encode the conversation and compare prompt and ids."""
    conversation, prompt = case.said.values.get("conversation"), case.said.text("prompt")
    if not isinstance(conversation, list):
        raise SeekVLError(f"{case.said.where} has no conversation: reinstall seekvl")
    pictures = SELFCHECK / "images"
    inputs = checkpoint.processor(
        [turn | {"images": [str(pictures / name) for name in turn["images"]]} for turn in conversation]
    )
    if inputs.prompt != prompt:
        raise SeekVLError(f"the prompt is {inputs.prompt!r} instead of {prompt!r}")
    return inputs, _same_ids(inputs.input_ids.tolist(), case.value("input_ids"))


def _pixels(inputs: ModelInput, case: Case) -> tuple[None, str]:
    """Compare the pixels of all pictures bit for bit."""
    assert inputs.pixels is not None
    found = hashlib.sha256(inputs.pixels.contiguous().numpy().tobytes()).hexdigest()
    wanted = case.said.text("pixels_sha256")
    if found != wanted:
        raise SeekVLError(
            f"the pixels have the digest {found[:12]} instead of {wanted[:12]}: another Pillow may resize "
            "differently"
        )
    return None, f"{list(inputs.pixels.shape)} equal bit for bit"


def _vision(model: AnyVL, inputs: ModelInput, case: Case) -> tuple[Tensor, str]:
    """Run tower and adaptor; compare the rows, of the hybrid tower every fifth feature of both its halves."""
    assert inputs.pixels is not None
    if not isinstance(model, VL):
        assert inputs.grids is not None
        rows = model.encode_pictures(inputs.pixels, grids=inputs.grids)
        return rows, _compare(rows, case.value("image_token_embeds"), limit=FEATURES)
    assert isinstance(model.vision, Hybrid)
    high, low = model.vision(inputs.pixels)
    lines = [
        f"{name} {_compare(found[:, ::5], case.value(f'vision_features_{name}_every_5th'), limit=FEATURES)}"
        for name, found in (("high", high), ("low", low))
    ]
    return model.adaptor((high, low)), "; ".join(lines)


def _logits(model: AnyVL, inputs: ModelInput, features: Tensor | None, case: Case) -> tuple[Tensor, str]:
    """Put the picture rows in their places and compare the logits of the last position."""
    embeds = model.embed(inputs.input_ids[None], image_mask=inputs.image_mask[None], image_features=features)
    logits = model.head(model.hidden(embeds)[:, -1])
    return embeds, _compare(logits, case.value("logits_last"), limit=LOGITS)


def _greedy(model: AnyVL, embeds: Tensor, expected: Tensor) -> tuple[None, str]:
    """Compare greedy ids, each found with a full pass: slow, obvious, and without a cache."""
    found: list[int] = []
    for _ in range(expected.numel()):
        token = model.head(model.hidden(embeds)[:, -1]).argmax(-1)
        found.append(int(token))
        embeds = torch.cat((embeds, model.language.embed_tokens(token)[:, None]), dim=1)
    return None, _same_ids(found, expected)


def _router(folder: Path) -> tuple[None, str]:
    """Send the hidden states f[1, t, d] through attention, and compare where the router sends each token."""
    config = read_config(folder)
    assert isinstance(config.model, VL2Config)
    expected = _tensors(folder / "expected.safetensors")
    hidden = _value(expected, "hidden")  # 1 t d
    layer = _layer(folder, config)
    assert isinstance(layer.mlp, Moe)
    table = _table(config.model.language, tokens=hidden.shape[1])
    attended = hidden + layer.attn(layer.attn_norm(hidden), table=table, mask=None, cache=None, layer=LAYER)
    routing = layer.mlp.gate(layer.mlp_norm(attended))
    experts, order = routing.experts[0].sort(dim=-1)  # t k
    _same_ids(experts.flatten().tolist(), _value(expected, "experts"))
    line = _compare(routing.weights[0].gather(-1, order), _value(expected, "weights"), limit=WEIGHTS)
    return None, f"{len(experts)} tokens go to the same experts; their weights: {line}"


def _table(config: DeepseekV2Config, *, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the rotary table of the first tokens."""
    return rotary_table(torch.arange(tokens)[None], width=config.rope_width, theta=config.rope_theta)


def _layer(folder: Path, config: CheckpointConfig) -> Layer:
    """Build the layer and fill attention, norms and router; its experts stay without numbers."""
    layer = on_meta(config.model).language.layers[LAYER].requires_grad_(False)
    assert isinstance(layer, Layer)
    targets, own = layout_map(config).targets, f"language.layers.{LAYER}."
    state = {
        targets[key].parameter.removeprefix(own): value
        for key, value in _tensors(folder / "layer.safetensors").items()
    }
    wanted = {name for name in layer.state_dict() if not name.startswith(("mlp.experts.", "mlp.shared."))}
    if set(state) != wanted:
        raise SeekVLError(
            f"{folder / 'layer.safetensors'} fills {sorted(state)} instead of {sorted(wanted)}: reinstall "
            "seekvl"
        )
    layer.load_state_dict(state, strict=False, assign=True)
    return layer


def _boxes() -> tuple[None, str]:
    """Read the boxes in some answers."""
    cases = Section.of_file(SELFCHECK / "grounding.json")
    count = 0
    for name in cases.values:
        case = cases.section(name)
        found = [[box.label, *box.corners] for box in parse_boxes(case.text("answer"))]
        wanted = case.values.get("boxes")
        if found != wanted:
            raise SeekVLError(f"{name}: the boxes are {found} instead of {wanted}")
        count += len(found)
    return None, f"{count} boxes of {len(cases.values)} answers equal"


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that ships with the package."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SeekVLError(f"{path} cannot be read ({error}): reinstall seekvl") from error


def _value(values: Mapping[str, Tensor], key: str) -> Tensor:
    """Return one of them."""
    if key not in values:
        raise SeekVLError(f"the vectors have no {key}, only {', '.join(sorted(values))}: reinstall seekvl")
    return values[key]


def _same_ids(found: list[int], expected: Tensor) -> str:
    """Say how many whole numbers are equal, or raise SeekVLError that names the first that is not."""
    wanted = expected.flatten().tolist()
    for place, (one, other) in enumerate(zip(found, wanted, strict=False)):
        if one != other:
            raise SeekVLError(f"number {place} of {len(wanted)} is {one} instead of {other}")
    if len(found) != len(wanted):
        raise SeekVLError(f"there are {len(found)} numbers instead of {len(wanted)}")
    return f"{len(wanted)} ids equal"


def _compare(found: Tensor, expected: Tensor, *, limit: float) -> str:
    """Say how large the largest difference is, or raise SeekVLError that names the number where it is.

    Raises for another shape and for NaN, too.
    """
    if found.shape != expected.shape:
        raise SeekVLError(f"the shape is {list(found.shape)} instead of {list(expected.shape)}")
    difference = (found - expected).abs()
    worst = float(difference.max())  # NaN where there is one
    if worst <= limit:
        return f"largest difference {worst:.1e} (at most {limit:.0e})"
    flat = difference.nan_to_num(nan=torch.inf).argmax()
    place = tuple(int(index) for index in torch.unravel_index(flat, difference.shape))
    raise SeekVLError(
        f"differs by {worst:.1e} from the reference, at most {limit:.0e} is allowed: number {list(place)} is "
        f"{float(found[place]):.6g} instead of {float(expected[place]):.6g}"
    )
