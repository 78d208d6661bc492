"""What the kernels do on this machine, in a line."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from seekvl.engine.cache import KVCache
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.engine.kernels.compiled import SWITCH, choose_level, library, missing
from seekvl.engine.kernels.decoder import decode
from seekvl.engine.kernels.packed import packed_linear
from seekvl.engine.kernels.products import MAX_ROWS, linear
from seekvl.engine.kernels.prompts import prompt_hidden, prompt_logits, prompts_served
from seekvl.engine.kernels.towers import TOWERS, tower_level
from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.mla import MlaConfig
from seekvl.models.moe import Experts, MoeConfig
from seekvl.models.quantized import GROUP, KINDS, Kind, pack, rounded_inputs
from seekvl.models.sam import Sam, SamConfig
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.runtime import SeekVLError, torch_generator
from seekvl.weights.quantize import STAYS, quantize_module

N = TypeVar("N", bound=nn.Module)

WIDTH = 515
"""No multiple of any vector."""

STEP_LIMIT = 1e-5
"""Largest difference of logits of size 1, of a step and of a prompt, and of features; float32 in two orders
of summation leaves a quarter of it.
"""

INPUT_LIMIT = 0.05
"""Largest difference of a row of a quantised step: an input on the border between two whole numbers may fall
the other way, a hundredth of itself. It does in few rows, so that half of them keep within `STEP_LIMIT`.
"""

PROMPT = 150
"""Tokens of a prompt: several blocks of lanes, and two of columns."""

LATENT = DeepseekV2Config(
    vocab_size=301,
    width=66,
    layers=2,
    heads=3,
    kv_heads=3,
    mlp_width=75,
    mla=MlaConfig(kv_rank=37, nope_width=13, rope_width=10, value_width=11),
    moe=MoeConfig(experts=8, active=3, shared=1, width=21, scoring="softmax", choice="greedy"),
    dense_first=1,
)
"""A language model with every part that a step has; with `mla` None it is one of plain attention."""

PATCHES = SiglipConfig(image_size=40, patch_size=4, width=60, layers=2, heads=3, mlp_width=77)
MAP = SamConfig(
    image_size=40, patch_size=4, width=60, layers=2, heads=3, mlp_width=77, window=7, global_layers=(1,)
)
"""Two vision towers, of 100 patches each; the windows of the second are padded."""

TOKENS = (0, 1, 130, 257)
"""What the rows of a step hold, and the token each is given."""


def compare_with_torch() -> str:
    """Multiply, decode, read a prompt and see a picture with the kernels and with torch, the first three with
    quantised matrices, too; say on which level and how far they are apart.

    Raises SeekVLError where they differ by more than the order of summation explains, and for a level named
    by `SWITCH` that cannot be had.
    """
    level = choose_level()
    if level is None:
        return f"torch computes: {missing() or f'{SWITCH}=off'}"
    generator = torch_generator(0, "kernels")
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(MAX_ROWS, WIDTH, generator=generator)
    product = _product("a product", linear(x, weight, level=level), x, weight, level=level)
    for kind in KINDS:
        groups = () if kind == "int8" else (-(-WIDTH // GROUP),)
        values = torch.randint(-7, 8, (WIDTH, WIDTH), generator=generator)
        packed = pack(values, torch.ones(WIDTH, *groups), kind=kind)
        found = packed_linear(x, packed, kind=kind, rows=WIDTH, level=level)
        _product(f"a product of {kind}", found, rounded_inputs(x, kind=kind), values, level=level)
    configs = (LATENT, replace(LATENT, mla=None))
    step = _largest([float(step_differences(config, level=level).max()) for config in configs])
    _check("a decoding step", step, limit=STEP_LIMIT, level=level)
    packed_step = max(_packed_step(config, kind, level=level) for config in configs for kind in KINDS)
    prompts = [prompt_difference(config, level=level) for config in configs]
    told = [found for found in prompts if found is not None]
    prompt = _largest(told) if told else None
    if prompt is not None:
        _check("a prompt", prompt, limit=STEP_LIMIT, level=level)
    packed_prompts = [_packed_prompt(config, kind, level=level) for config in configs for kind in KINDS]
    packed_told = [found for found in packed_prompts if found is not None]
    tower = tower_difference(level=level)
    if tower is not None:
        _check("a vision tower", tower, limit=STEP_LIMIT, level=level)
    figures = {
        "a product": product,
        "a step": step,
        "a quantised step": packed_step,
        "a prompt": prompt,
        "a quantised prompt": _largest(packed_told) if packed_told else None,
        "a vision tower": tower,
    }
    far = ", ".join(f"{figure:.1e} in {what}" for what, figure in figures.items() if figure is not None)
    left = ", ".join(what for what, figure in figures.items() if figure is None)
    vnni = ", quantised by VNNI" if library().vnni and level.startswith("avx512") else ""
    return f"{level} of {', '.join(library().levels)}{vnni}; largest difference from torch {far}" + (
        f"; torch computes {left}" if left else ""
    )


def _product(what: str, found: Tensor, x: Tensor, weight: Tensor, *, level: str) -> float:
    """Return the largest difference of a product from that of torch, which must be one of rounding."""
    weight = weight.float()
    worst = float((found.double() - x.double() @ weight.double().T).abs().max())
    _check(what, worst, limit=WIDTH * 2.0**-24 * float((x.abs() @ weight.abs().T).max()), level=level)
    return worst


def _largest(differences: list[float]) -> float:
    """Return the largest difference; NaN, which Python's own `max` may pass over, where one is.

    >>> _largest([0.5, float("nan")])
    nan
    """
    return float(torch.tensor(differences, dtype=torch.float64).max())


def _check(what: str, found: float, *, limit: float, level: str) -> None:
    """Refuse a difference above the limit, and one that is no number."""
    if not found <= limit:
        raise SeekVLError(
            f"{level} differs by {found:.1e} from torch in {what}, at most {limit:.0e} is allowed; set "
            f"{SWITCH}=off and report it"
        )


def _packed_step(config: DeepseekV2Config, kind: Kind, *, level: str) -> float:
    """Return the difference of the rows of a quantised step that half of them keep within."""
    rows = step_differences(config, level=level, kind=kind)
    usual = float(rows.median())
    _check(f"a decoding step of {kind}", usual, limit=STEP_LIMIT, level=level)
    _check(f"a row of a decoding step of {kind}", float(rows.max()), limit=INPUT_LIMIT, level=level)
    return usual


def _packed_prompt(config: DeepseekV2Config, kind: Kind, *, level: str) -> float | None:
    """Return the difference of the tokens of a quantised prompt that half of them keep within; None where
    torch reads prompts.
    """
    tokens = prompt_differences(config, level=level, kind=kind)
    if tokens is None:
        return None
    usual = float(tokens.median())
    _check(f"a prompt of {kind}", usual, limit=STEP_LIMIT, level=level)
    _check(f"a token of a prompt of {kind}", float(tokens.max()), limit=INPUT_LIMIT, level=level)
    return usual


@torch.inference_mode()
def step_differences(config: DeepseekV2Config, *, level: str, kind: Kind | None = None) -> Tensor:
    """Return the largest difference of the logits of each row f32[n] of a decoding step, of a network with
    random weights, plain or of a kind.
    """
    network = _random(DeepseekV2(config))
    if kind is not None:
        _quantize(network, kind)
    held = [_filled(config), _filled(config)]
    n, (keys, values) = len(TOKENS), held[0].buffers
    accelerate(network, level=level)
    found = decode(network, TOKENS, slots=range(n), positions=TOKENS, keys=keys, values=values)
    accelerate(network, level="off")
    assert found is not None, "a network of our own classes on the CPU"
    embeds = network.embed_tokens(torch.tensor(TOKENS).unsqueeze(1))
    at = held[1].at(range(n))
    hidden = network(embeds, positions=at.positions(), mask=at.mask(), cache=at)
    wanted: Tensor = network.lm_head(hidden[:, 0])
    return (found - wanted).abs().amax(dim=1)


@torch.inference_mode()
def prompt_difference(config: DeepseekV2Config, *, level: str) -> float | None:
    """Return the largest difference of the logits after a prompt, of a network with random weights; None
    where torch is faster and reads prompts.
    """
    network = _random(DeepseekV2(config))
    embeds, keys, values = _prompt(config)
    accelerate(network, level=level)
    if not prompts_served(network):
        return None
    found = prompt_logits(network, embeds, slot=0, start=0, keys=keys, values=values)
    accelerate(network, level="off")
    assert found is not None, "a network of our own classes on the CPU"
    wanted: Tensor = network.lm_head(network(embeds[None])[0, -1])
    return float((found - wanted).abs().max())


@torch.inference_mode()
def prompt_differences(config: DeepseekV2Config, *, level: str, kind: Kind) -> Tensor | None:
    """Return the largest difference of the hidden states of each token f32[n] of a prompt, of a network with
    random weights of a kind; None where torch reads prompts.

    The network has its last layer alone. An input that falls the other way changes all tokens behind it by
    the next one, and half of them must keep within the limit.
    """
    network = _random(DeepseekV2(replace(config, layers=1, dense_first=0)))
    _quantize(network, kind)
    embeds, keys, values = _prompt(network.config)
    accelerate(network, level=level)
    if not prompts_served(network):
        return None
    found = prompt_hidden(network, embeds, slot=0, start=0, keys=keys, values=values)
    accelerate(network, level="off")
    assert found is not None, "a network of our own classes on the CPU"
    wanted: Tensor = network(embeds[None])[0]
    return (found - wanted).abs().amax(dim=1)


@torch.inference_mode()
def tower_difference(*, level: str) -> float | None:
    """Return the largest difference of the features of two vision towers with random weights, behind their
    blocks; None where torch is faster and sees pictures.
    """
    worst = []
    for tower in (_random(Siglip(PATCHES)), _random(Sam(MAP))):
        x = torch.randn(tower.pos_embed.shape, generator=torch_generator(0, "patches"))
        accelerate(tower, level=level, kernels=TOWERS)
        if tower_level(tower) is None:
            return None
        found = tower.transform(x)
        accelerate(tower, level="off", kernels=TOWERS)
        pairs = zip(_tensors(found), _tensors(tower.transform(x)), strict=True)
        worst += [(ours - theirs).abs().max() for ours, theirs in pairs]
    return float(torch.stack(worst).max())


def _tensors(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return one tensor as a tuple, too."""
    return found if isinstance(found, tuple) else (found,)


def _random(network: N) -> N:
    """Give a network random weights that depend on nothing."""
    generator = torch_generator(0, "weights of a step")
    for name, parameter in network.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return network


def _quantize(network: DeepseekV2, kind: Kind) -> None:
    """Quantise what a language model may have quantised, however small."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear | Experts) and name.rpartition(".")[2] not in STAYS:
            network.set_submodule(name, quantize_module(module, kind)[0])


def _prompt(config: DeepseekV2Config) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the embeddings f32[n, d] of a prompt, and the buffers of an empty cache with room for it."""
    embeds = torch.randn(PROMPT, config.width, generator=torch_generator(0, "a prompt"))
    held = KVCache(config, rows=1, device=torch.device("cpu"), dtype=torch.float32)
    held.reserve(PROMPT)
    return embeds, *held.buffers


def _filled(config: DeepseekV2Config) -> KVCache:
    """Make a cache whose rows hold `TOKENS` tokens."""
    generator = torch_generator(0, "cache of a step")
    held = KVCache(config, rows=len(TOKENS), device=torch.device("cpu"), dtype=torch.float32)
    held.reserve(max(TOKENS) + 1)
    for buffers in held.buffers:
        for buffer in buffers:
            buffer.normal_(generator=generator)
    held.lengths = list(TOKENS)
    return held
