"""Towers in one call, beside the networks they compute: tiny, of odd widths, with random weights."""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seekvl
from seekvl.engine.kernels import towers
from seekvl.engine.kernels.accelerate import KERNELS, MOST_ROWS, accelerate
from seekvl.engine.kernels.compiled import LEVELS, SWITCH, Library
from seekvl.engine.kernels.towers import TOWERS, KernelSam, tower_level
from seekvl.models.quantized import KINDS, Kind
from seekvl.models.sam import Sam, SamConfig
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.weights.quantize import quantize_module
from tests.parity import test_checkpoints, test_vl2_networks

GOLDEN = Path(__file__).parents[2] / "golden"

SMALL = SiglipConfig(image_size=56, patch_size=8, width=36, layers=2, heads=3, mlp_width=47)
"""49 patches, a block and one; 12 channels a head, and an odd number of hidden ones."""
WIDE = SiglipConfig(image_size=136, patch_size=8, width=144, layers=2, heads=2, mlp_width=90, gelu="tanh")
"""289 patches, three blocks of columns; 72 channels a head."""
MAP = SamConfig(
    image_size=96,
    patch_size=8,
    width=24,
    layers=3,
    heads=2,
    mlp_width=32,
    window=5,
    global_layers=(1, 2),
    neck_channels=8,
    downsample_channels=(12, 16),
    resize_side=16,
)
"""12 patches a side: 9 windows of 5, of which 5 are padded."""
CONFIGS: dict[str, SiglipConfig | SamConfig] = {
    "small": SMALL,
    "wide": WIDE,
    "deep": replace(SMALL, heads=1, width=64, layers=5),
    "map": MAP,
    "large windows": replace(MAP, image_size=160, window=14, global_layers=(1,)),
    "a window that is the map": replace(MAP, window=12),
    "a window larger than the map": replace(MAP, image_size=72, window=12, heads=1),
    "many patches": replace(MAP, image_size=256, layers=2, global_layers=(0,), window=7),
}
ALL = pytest.mark.parametrize("name", CONFIGS)
ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
Tower = Siglip | Sam


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _every_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every level serve, gain or not, but where that is what is tested."""
    if "native" not in request.fixturenames or "level" in request.fixturenames:
        monkeypatch.setattr(towers, "_GAINING", frozenset(range(len(LEVELS))))


def build(name: str) -> Tower:
    """Make a tower whose every weight counts."""
    return copy.deepcopy(_built(name))


@cache
def _built(name: str) -> Tower:
    config, generator = CONFIGS[name], torch.Generator().manual_seed(5)
    tower = Siglip(config) if isinstance(config, SiglipConfig) else Sam(config)
    for key, parameter in tower.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        nn.init.normal_(parameter, std=std, generator=generator)
        if "norm" in key and key.endswith("weight"):
            parameter.add_(1.0)
    return tower.requires_grad_(False)


def pictures(tower: Tower, *, count: int = 1) -> Tensor:
    side, generator = tower.config.image_size, torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, side, side, generator=generator)
    return pixels.to(tower.pos_embed.dtype)


def by_torch(tower: Tower, pixels: Tensor) -> Tensor:
    accelerate(tower, level="off", kernels=TOWERS)
    out: Tensor = tower(pixels, normalized=True)
    return out


def by_kernels(tower: Tower, pixels: Tensor, level: str) -> Tensor:
    accelerate(tower, level=level, kernels=TOWERS)
    assert tower_level(tower) == level
    out: Tensor = tower(pixels, normalized=True)
    assert out.dtype == pixels.dtype
    return out


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@ALL
def test_features_are_those_of_the_network(name: str, level: str) -> None:
    tower = build(name)
    pixels = pictures(tower, count=2)
    assert distance(by_kernels(tower, pixels, level), by_torch(tower, pixels)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ALL
def test_half_precision_is_as_near_to_float32_as_torch(name: str, level: str, dtype: torch.dtype) -> None:
    half = build(name).to(dtype)
    exact = copy.deepcopy(half).float()
    pixels = pictures(half)
    wanted = by_torch(exact, pixels.float())
    theirs = distance(by_torch(half, pixels), wanted)
    assert 0 < distance(by_kernels(half, pixels, level), wanted) < 1.1 * theirs + 1e-4


@ALL_DTYPES
@pytest.mark.parametrize("name", ["small", "wide", "map", "many patches"])
def test_a_picture_is_the_same_among_others(name: str, level: str, dtype: torch.dtype) -> None:
    tower = build(name).to(dtype)
    pixels = pictures(tower, count=3)
    together = by_kernels(tower, pixels, level)
    for index in (2, 0, 1):
        # The patch embedding is torch's, which may round differently in a batch: the blocks are ours.
        assert (
            distance(by_kernels(tower, pixels[index : index + 1], level), together[index : index + 1]) < 1e-2
        )
    x = torch.randn(3, *tower.pos_embed.shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    together, branch = transformed(tower, x)
    for index in (2, 0, 1):
        alone = transformed(tower, x[index : index + 1])
        assert torch.equal(alone[0][0], together[index])
        assert torch.equal(alone[1][0], branch[index])


def transformed(tower: Tower, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the blocks give, and the side branch, which without one is the same."""
    out = tower.transform(x)
    return out if isinstance(out, tuple) else (out, out)


@ALL_DTYPES
@pytest.mark.parametrize("name", ["small", "wide", "map", "large windows", "many patches"])
def test_the_number_of_threads_changes_no_bit(name: str, level: str, dtype: torch.dtype) -> None:
    tower = build(name).to(dtype)
    x = torch.randn(2, *tower.pos_embed.shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    accelerate(tower, level=level, kernels=TOWERS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(transformed(tower, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_callers_at_once_do_not_disturb_each_other(level: str) -> None:
    tower = build("map")
    accelerate(tower, level=level, kernels=TOWERS)
    inputs = [torch.randn(1, *tower.pos_embed.shape[1:]) for _ in range(4)]
    wanted = [transformed(tower, x)[0] for x in inputs]

    def again(x: Tensor) -> Tensor:
        with torch.no_grad():
            return transformed(tower, x)[0]

    with ThreadPoolExecutor(4) as pool:
        for found, same in zip(pool.map(again, inputs * 5), wanted * 5, strict=True):
            assert torch.equal(found, same)


def test_patches_need_not_be_contiguous(level: str) -> None:
    tower = build("map")
    x = torch.randn(24, 12, 12, 2).permute(3, 1, 2, 0)
    accelerate(tower, level=level, kernels=TOWERS)
    for found, wanted in zip(transformed(tower, x), transformed(tower, x.contiguous()), strict=True):
        assert torch.equal(found, wanted)
        assert found.is_contiguous()


def test_no_pictures_have_no_features(level: str) -> None:
    tower = build("small")
    accelerate(tower, level=level, kernels=TOWERS)
    assert tower.transform(torch.empty(0, 49, 36)).shape == (0, 49, 36)  # type: ignore[union-attr]


@pytest.mark.parametrize("curve", ["erf", "tanh"])
def test_both_gelus_far_out(curve: str, level: str) -> None:
    """Hidden numbers from -40 to 40, of which nothing is added up: one goes through to each channel."""
    config = SiglipConfig(
        image_size=48,
        patch_size=8,
        width=8,
        layers=1,
        heads=1,
        mlp_width=8,
        gelu=curve,  # type: ignore[arg-type]
    )
    tower = Siglip(config).requires_grad_(False)
    block: Any = tower.blocks[0]
    for parameter in tower.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(tower.norm.weight)
    tower.norm.eps = 1e4  # so that the last norm keeps differences of size
    nn.init.ones_(block.norm2.weight)
    nn.init.eye_(block.mlp.fc2.weight)
    for scale in (0.1, 1.0, 8.0, 40.0):
        nn.init.eye_(block.mlp.fc1.weight)
        block.mlp.fc1.weight.mul_(scale)
        x = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(2))
        accelerate(tower, level=level, kernels=TOWERS)
        found = tower.transform(x)
        accelerate(tower, level="off", kernels=TOWERS)
        assert (found - tower.transform(x)).abs().max() < 1e-7 * max(scale, 3.0)


def test_peaks_of_attention_far_apart(level: str) -> None:
    """Scores of hundreds: one key takes all, in whatever block of columns it is."""
    for name in ("wide", "map"):
        tower = build(name)
        for block in tower.blocks:
            block.attn.qkv.weight.mul_(6.0)  # type: ignore[union-attr, operator]
        pixels = pictures(tower)
        assert distance(by_kernels(tower, pixels, level), by_torch(tower, pixels)) < 1e-4


def test_a_picture_that_is_no_number_spoils_no_other(level: str) -> None:
    tower = build("map")
    x = torch.randn(3, *tower.pos_embed.shape[1:])
    accelerate(tower, level=level, kernels=TOWERS)
    wanted = transformed(tower, x)[0]
    x[1, 3, 4, 5] = torch.nan
    found = transformed(tower, x)[0]
    assert found[1].isnan().all()  # the last block sees the whole picture
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def test_weights_are_read_where_they_are_now(level: str) -> None:
    tower = build("small")
    x = pictures(tower)
    before = by_kernels(tower, x, level)
    tower.blocks[1].mlp.fc2.weight.mul_(2.0)  # type: ignore[union-attr, operator]
    tower.blocks[0].attn.proj.bias = nn.Parameter(torch.ones(36), requires_grad=False)  # type: ignore[union-attr, assignment]
    found = by_kernels(tower, x, level)
    assert not torch.equal(found, before)
    assert distance(found, by_torch(tower, x)) < 2e-6


def test_levels_that_are_slower_than_torch_leave_towers_to_it(native: Library) -> None:
    tower = build("small")
    for name in native.levels:
        accelerate(tower, level=name, kernels=TOWERS)
        assert tower_level(tower) == (name if name in MOST_ROWS else None)
    assert accelerate(tower, level="off", kernels=TOWERS) is None
    assert tower_level(tower) is None
    assert type(tower) is Siglip


def adapt(tower: Any) -> None:
    class Adapted(nn.Linear):
        """Somebody's own."""

    tower.blocks[0].attn.qkv.__class__ = Adapted


def wrap(tower: Any) -> None:
    tower.blocks[1] = nn.Sequential(tower.blocks[1])


def wrap_mlp(tower: Any) -> None:
    tower.blocks[1].mlp = nn.Sequential(tower.blocks[1].mlp)


def listen(tower: Any) -> None:
    tower.blocks[0].register_forward_hook(lambda *_: None)


def listen_before(tower: Any) -> None:
    tower.blocks[1].mlp.fc1.register_forward_pre_hook(lambda *_: None)


def replace_forward(tower: Any) -> None:
    norm = tower.blocks[0].norm2
    norm.forward = norm.forward


def transpose_in_place(tower: Any) -> None:
    weight = tower.blocks[0].attn.proj.weight
    weight.data = weight.data.T


def drop_bias(tower: Any) -> None:
    tower.blocks[0].attn.proj.bias = None


def mix_dtypes(tower: Any) -> None:
    tower.blocks[1].norm1.to(torch.bfloat16)


def lengthen(tower: Any) -> None:
    tower.blocks.append(copy.deepcopy(tower.blocks[0]))


def drop_norm(tower: Any) -> None:
    tower.blocks[0].norm1 = nn.LayerNorm(tower.config.width, elementwise_affine=False)


UNSERVED = (
    *(adapt, wrap, wrap_mlp, listen, listen_before, replace_forward),
    *(transpose_in_place, drop_bias, mix_dtypes, lengthen, drop_norm),
)


@pytest.mark.parametrize("name", ["small", "map"])
@pytest.mark.parametrize("change", UNSERVED)
def test_what_one_call_does_not_serve(native: Library, change: Callable[[Tower], None], name: str) -> None:
    tower = build(name)
    accelerate(tower, kernels=TOWERS)
    change(tower)
    assert tower_level(tower) is None
    if change is not mix_dtypes:
        pixels = pictures(tower)
        assert torch.equal(tower(pixels, normalized=True), by_torch(tower, pixels))


def test_last_norms_and_tables_that_are_not_served(native: Library) -> None:
    tower: Any = build("small")
    accelerate(tower, kernels=TOWERS)
    tower.norm = nn.Identity()
    assert tower_level(tower) is None
    tower = build("map")
    accelerate(tower, kernels=TOWERS)
    tower.blocks[0].attn.rel_pos_h = nn.Parameter(torch.zeros(8, 12))
    assert tower_level(tower) is None


def test_an_odd_width_of_heads_stays_with_torch(native: Library) -> None:
    tower = Siglip(replace(SMALL, width=33)).requires_grad_(False)
    accelerate(tower, kernels=TOWERS)
    assert tower_level(tower) is None
    pixels = pictures(tower)
    assert torch.equal(tower(pixels, normalized=True), by_torch(tower, pixels))


def test_gradients_and_autocast_stay_as_they_were(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "_see", None)  # which may not be called
    for name in ("small", "map"):
        ours, plain = build(name), build(name)
        accelerate(ours, kernels=TOWERS)
        grads = []
        for tower in (ours, plain):
            tower.requires_grad_(True)
            with torch.enable_grad():
                tower(pictures(tower), normalized=True).square().mean().backward()
            grads.append([parameter.grad for parameter in tower.parameters()])
        for mine, theirs in zip(*grads, strict=True):
            assert mine is not None
            assert torch.equal(mine, theirs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pixels = pictures(plain)
            assert torch.equal(ours(pixels, normalized=True), plain(pixels, normalized=True))
        assert torch.equal(
            ours.double()(pixels.double(), normalized=True), plain.double()(pixels.double(), normalized=True)
        )
        assert ours.to("meta")(pixels.double().to("meta"), normalized=True).is_meta


LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def quantised(name: str, kind: Kind, *, only: tuple[str, ...] = LINEARS) -> Tower:
    """Make a tower of which these layers are quantised in every block."""
    tower = build(name)
    for block in tower.blocks:
        for layer in only:
            block.set_submodule(layer, quantize_module(block.get_submodule(layer), kind)[0])
    return tower


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["small", "wide", "map", "large windows"])
def test_a_quantised_tower_equals_its_layers(name: str, kind: Kind, level: str) -> None:
    """Where an input lies on the border between two whole numbers it may fall either way, which all patches
    see from the next block on: far less than what quantising changes.
    """
    tower, pixels = quantised(name, kind), pictures(build(name))
    found, wanted = by_kernels(tower, pixels, level), by_torch(tower, pixels)
    changed = distance(by_torch(build(name), pixels), wanted)
    assert distance(found, wanted) < 0.25 * changed


@pytest.mark.parametrize(
    "only", [LINEARS[:1], LINEARS[1:2], LINEARS[2:3], LINEARS[3:], LINEARS[::2]], ids=str
)
@pytest.mark.parametrize("name", ["wide", "map"])
def test_any_layer_may_be_quantised_among_plain_ones(name: str, only: tuple[str, ...], level: str) -> None:
    tower, pixels = quantised(name, "int8", only=only), pictures(build(name))
    found, wanted = by_kernels(tower, pixels, level), by_torch(tower, pixels)
    assert distance(found, wanted) < 0.25 * distance(by_torch(build(name), pixels), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["small", "wide", "map"])
def test_a_quantised_tower_of_half_precision_is_as_near_to_float32(
    name: str, level: str, dtype: torch.dtype
) -> None:
    half = quantised(name, "int8").to(dtype)
    exact = copy.deepcopy(half).float()
    pixels = pictures(half)
    wanted = by_torch(exact, pixels.float())
    theirs = distance(by_torch(half, pixels), wanted)
    assert 0 < distance(by_kernels(half, pixels, level), wanted) < 1.1 * theirs + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["wide", "large windows"])
def test_neither_threads_nor_neighbours_change_a_bit_of_a_quantised_tower(
    name: str, level: str, dtype: torch.dtype
) -> None:
    tower = quantised(name, "int8").to(dtype)
    x = torch.randn(2, *tower.pos_embed.shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    accelerate(tower, level=level, kernels=TOWERS)
    before, wanted = torch.get_num_threads(), transformed(tower, x)
    try:
        torch.set_num_threads(3)
        again, alone = transformed(tower, x), transformed(tower, x[1:])
    finally:
        torch.set_num_threads(before)
    for index in range(2):
        assert torch.equal(again[index], wanted[index])
        assert torch.equal(alone[index][0], wanted[index][1])


def test_quantised_layers_that_one_call_does_not_serve(native: Library) -> None:
    def drop_bias(layer: Any) -> None:
        layer.bias = None

    def stride(layer: Any) -> None:
        layer.packed = layer.packed.repeat_interleave(2, dim=1)[:, ::2]

    def move(layer: Any) -> None:
        layer.packed = layer.packed.to("meta")

    def listen(layer: Any) -> None:
        layer.register_forward_hook(lambda *_: None)

    for change in (drop_bias, stride, move, listen):
        tower: Any = quantised("map", "int8")
        accelerate(tower, kernels=TOWERS)
        assert tower_level(tower) == native.levels[-1]
        change(tower.blocks[1].mlp.fc1)
        assert tower_level(tower) is None


def test_linear_layers_may_be_those_of_the_kernels(native: Library) -> None:
    tower = build("small")
    accelerate(tower, kernels=KERNELS)
    accelerate(tower, kernels=TOWERS)
    assert tower_level(tower) == (native.levels[-1] if native.levels[-1] in MOST_ROWS else None)


def test_copies_parameters_and_names_are_the_same(native: Library) -> None:
    tower = build("map")
    state = {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()}
    accelerate(tower, kernels=TOWERS)
    assert {name: tensor.data_ptr() for name, tensor in tower.state_dict().items()} == state
    other, pixels = copy.deepcopy(tower), pictures(tower)
    assert type(other) is KernelSam
    assert torch.equal(other(pixels, normalized=True), tower(pixels, normalized=True))


def test_no_memory_is_an_error(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.levels[-1] not in MOST_ROWS:
        pytest.skip("torch computes towers on this machine")
    tower = build("map")
    accelerate(tower, kernels=TOWERS)
    monkeypatch.setattr(towers, "library", lambda: replace(native, tower=lambda *_: 1))
    with pytest.raises(MemoryError, match="no memory for a picture of 12 x 12 patches of 24"):
        tower(pictures(tower), normalized=True)


@pytest.mark.parametrize(
    "folder", ["vl1-siglip", "vl1-hybrid", "vl2-tiny-like", "vl2-small-like", "vl2-base-like"]
)
def test_golden_features(folder: str, level: str) -> None:
    """Those of the reference, within the tolerances of tests/parity."""
    if folder.startswith("vl1"):
        checkpoint = test_checkpoints.load(folder, preprocessing="official")
        model: Any = checkpoint.model
        inputs = test_checkpoints.encode(checkpoint, folder, "single")
        pixels, normalized = inputs.pixels, inputs.normalized
    else:
        model = test_vl2_networks.network(folder)
        pixels, normalized = test_vl2_networks.tiles_of(folder, "wide"), True
    accelerate(model.vision, level=level, kernels=TOWERS)
    try:
        towers_of = [tower for tower in model.vision.modules() if isinstance(tower, Siglip | Sam)]
        assert all(tower_level(tower) == level for tower in towers_of)
        found = model.vision(pixels, normalized=normalized)
    finally:
        accelerate(model.vision, level="off", kernels=TOWERS)
    if folder.startswith("vl2"):
        wanted = test_vl2_networks.values(folder)["wide/vision_features"]
        assert test_vl2_networks.worst(found, wanted) < test_vl2_networks.FEATURES
        return
    names = ("vision_features_high", "vision_features_low") if len(towers_of) == 2 else ("vision_features",)
    for name, features in zip(names, found if len(towers_of) == 2 else (found,), strict=True):
        pair = test_checkpoints.expected(folder, "single", name, features)
        assert test_checkpoints.worst(*pair) < test_checkpoints.FEATURES


@pytest.mark.parametrize("folder", ["vl1-hybrid", "vl1-siglip", "vl2-tiny-like"])
def test_a_loaded_model_sees_through_the_kernels(
    native: Library, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    for switch in ("auto", "off"):
        monkeypatch.setenv(SWITCH, switch)
        vlm = seekvl.load(GOLDEN / folder, device="cpu", dtype="float32", preprocessing="official")
        seen = [module for module in vlm.model.vision.modules() if isinstance(module, Siglip | Sam)]
        level = native.levels[-1] if switch == "auto" and native.levels[-1] in MOST_ROWS else None
        assert [tower_level(tower) for tower in seen] == [level] * (2 if folder == "vl1-hybrid" else 1)
