"""The blocks of a vision tower in one call: from embedded patches to features.

Torch starts a dozen operations a block, each of which reads and writes the whole stream. Here the stream is
packed once for the products that share it, queries and hidden numbers stay packed between two products,
values come out turned, and what attention and MLP give is added to the stream where it arises. Patches lie
in the order of the windows, so that those that see each other are neighbours; a block that sees the whole
picture does not care, for distances are looked up by place.

The stream is float32 from the patches to the features; the weights stay where torch keeps them. Inputs of
products, keys, values and shares of attention are rounded where a level multiplies pairs of bfloat16, inputs
of quantised matrices as `models.quantized` says, and nothing else. What a picture gives depends on the level
alone: not on the pictures beside it or on the number of threads, bit for bit.

Patch embedding, neck and downsampling stay with torch. So does everything where one call cannot serve a
tower, which is looked at in every call: it takes a thousandth of the time.

Letters: n pictures, g patches along a side, t = g * g patches, c width.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seekvl.engine.kernels.accelerate import MOST_ROWS, PACKED, KernelLinear, KernelQuantizedLinear
from seekvl.engine.kernels.compiled import LEVELS, library
from seekvl.engine.kernels.packed import NUMBERS
from seekvl.engine.kernels.products import DTYPES
from seekvl.engine.kernels.structures import LayerNorm, Matrix, Tower, TowerBlock, Views
from seekvl.models import sam, siglip
from seekvl.models.quantized import QuantizedLinear, packed_shape
from seekvl.models.sam import Sam, SamConfig, WindowAttention
from seekvl.models.siglip import Attention, Mlp, Siglip, SiglipConfig

CURVES = {"none": 1, "tanh": 2}
"""Number of a GELU, by what torch calls its approximation."""

_GAINING = frozenset(LEVELS.index(level) for level in MOST_ROWS)
"""Levels on which a tower is faster than in torch, with every dtype."""

PLAIN = frozenset(
    (
        *(siglip.Block, sam.Block, Attention, WindowAttention, Mlp),
        *(nn.ModuleList, nn.LayerNorm, nn.Linear, KernelLinear, QuantizedLinear, KernelQuantizedLinear),
    )
)
"""What the blocks of a tower may be made of. A subclass of these is somebody else's, and computes as he
wants.
"""


class KernelSiglip(Siglip):
    """A SigLIP tower that answers through the kernels."""

    level: int
    """Index into `LEVELS`."""
    smallest: int | None
    """Without meaning here: a tower is called once a picture."""

    def transform(self, x: Tensor) -> Tensor:
        """Return the features f[n, t, c] of embedded patches f[n, t, c]."""
        found = describe(self, x)
        return super().transform(x) if found is None else _see(found, x, level=self.level)


class KernelSam(Sam):
    """A SAM tower whose blocks answer through the kernels."""

    level: int
    smallest: int | None

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last block makes of embedded patches f[n, g, g, c], and what the first global one
        does.
        """
        found = describe(self, x)
        if found is None:
            return super().transform(x)
        branch = torch.empty_like(x, memory_format=torch.contiguous_format)
        layer = self.config.global_layers[0]
        return _see(found, x, level=self.level, branch=branch, branch_block=layer), branch


TOWERS: dict[type[nn.Module], type[nn.Module]] = {Siglip: KernelSiglip, Sam: KernelSam, **PACKED}
"""What takes the place of what in a vision tower. Its quantised layers are called by themselves where one
call cannot serve the tower.
"""


def tower_level(tower: Siglip | Sam) -> str | None:
    """Return the level on which a tower answers in one call; None where torch computes it, or would for the
    moment, as with gradients.
    """
    if not isinstance(tower, KernelSiglip | KernelSam):
        return None
    return LEVELS[tower.level] if describe(tower, tower.pos_embed.detach()) is not None else None


@dataclass(frozen=True, slots=True)
class Description:
    """The blocks of a tower as the library sees them; good as long as nobody touches the tower."""

    tower: Tower
    _blocks: ctypes.Array[TowerBlock]
    """What `tower` holds the address of."""


def describe(network: KernelSiglip | KernelSam, x: Tensor) -> Description | None:
    """Describe a tower for embedded patches f[n, ..., c]; None where one call cannot serve it or the moment.

    That is so on levels that do not gain; with a gradient, under autocast, for patches that are elsewhere or
    of numbers that the kernels do not know; and where a part is not of the class of `PLAIN`, has a hook, or
    has weights of another dtype that are not quantised, not in plain memory, or of other sizes than the
    config says.
    """
    config = network.config
    if (
        network.level not in _GAINING
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not (x.is_cpu and x.dtype in DTYPES and type(x) is Tensor)
        or x.shape[1:] != network.pos_embed.shape[1:]
        or config.width // config.heads % 2  # numbers of a head are packed in pairs
        or len(network.blocks) != config.layers
    ):
        return None
    blocks = (TowerBlock * config.layers)()
    for layer, block in enumerate(network.blocks):
        if not (_plain(block) and _fits(block, config, dtype=x.dtype)):
            return None
        blocks[layer] = _block(block, grid=config.grid)
    tower = Tower(
        kind=DTYPES[x.dtype],
        width=config.width,
        heads=config.heads,
        hidden=config.mlp_width,
        grid=config.grid,
        window=config.window if isinstance(config, SamConfig) else config.grid,
        block_count=config.layers,
        blocks=ctypes.addressof(blocks),
    )
    if isinstance(network, KernelSiglip):
        if not (_plain(network.norm) and _norm_fits(network.norm, config.width, dtype=x.dtype)):
            return None
        tower.norm = _norm(network.norm)
    return Description(tower, blocks)


def _see(
    found: Description, x: Tensor, *, level: int, branch: Tensor | None = None, branch_block: int = 0
) -> Tensor:
    """Return what becomes of embedded patches f[n, ..., c]; `branch` gets what a block in between gives."""
    x = x.contiguous()
    y = torch.empty_like(x)
    views = Views(
        n=len(x),
        x=x.data_ptr(),
        y=y.data_ptr(),
        branch=None if branch is None else branch.data_ptr(),
        branch_block=branch_block,
    )
    threads, tower = torch.get_num_threads(), found.tower
    if library().tower(level, threads, ctypes.addressof(tower), ctypes.addressof(views)):
        raise MemoryError(f"no memory for a picture of {tower.grid} x {tower.grid} patches of {tower.width}")
    return y


def _plain(part: nn.Module) -> bool:
    """Whether a part of a tower, and all that is in it, computes as its class says."""
    return all(
        type(module) in PLAIN
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        for module in part.modules()
    )


def _fits(block: nn.Module, config: SiglipConfig | SamConfig, *, dtype: torch.dtype) -> bool:
    """Whether a block has the sizes that the config gives it: the library trusts it."""
    c, m = config.width, config.mlp_width
    if isinstance(block, siglip.Block):
        places: tuple[tuple[Tensor | None, tuple[int, ...]], ...] = ()
        sides: tuple[int, ...] = ()
    elif isinstance(block, sam.Block) and isinstance(config, SamConfig):
        side, sides = block.attn.side, (config.grid, config.window)
        table = (2 * side - 1, c // config.heads)
        places = ((block.attn.rel_pos_h, table), (block.attn.rel_pos_w, table))
        if side not in sides:
            return False
    else:
        return False
    linears = (
        *((block.attn.qkv, 3 * c, c), (block.attn.proj, c, c)),
        *((block.mlp.fc1, m, c), (block.mlp.fc2, c, m)),
    )
    return (
        block.attn.heads == config.heads
        and block.mlp.approximate in CURVES
        and all(_norm_fits(norm, c, dtype=dtype) for norm in (block.norm1, block.norm2))
        and all(_linear_fits(layer, rows, width, dtype=dtype) for layer, rows, width in linears)
        and all(_readable(tensor, shape, dtype=dtype) for tensor, shape in places)
    )


def _linear_fits(layer: nn.Module, rows: int, width: int, *, dtype: torch.dtype) -> bool:
    """Whether a linear layer, plain or quantised, has these sizes and a bias of this dtype."""
    if isinstance(layer, QuantizedLinear):
        packed = layer.packed
        fits = (
            type(packed) is Tensor
            and packed.is_cpu
            and packed.dtype is torch.uint8
            and packed.shape == packed_shape(layer.kind, rows, width)
            and packed.is_contiguous()
        )
    else:
        assert isinstance(layer, nn.Linear)
        fits = _readable(layer.weight, (rows, width), dtype=dtype)
    return fits and _readable(layer.bias, (rows,), dtype=dtype)


def _norm_fits(norm: nn.LayerNorm, width: int, *, dtype: torch.dtype) -> bool:
    """Whether a norm goes over the whole width, with a weight and a bias."""
    return norm.normalized_shape == (width,) and all(
        _readable(tensor, (width,), dtype=dtype) for tensor in (norm.weight, norm.bias)
    )


def _readable(weight: Tensor | None, shape: tuple[int, ...], *, dtype: torch.dtype) -> bool:
    """Whether a weight is plain memory of this shape and dtype."""
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.dtype is dtype
        and weight.layout == torch.strided
        and weight.shape == shape
        and weight.is_contiguous()
    )


def _block(block: nn.Module, *, grid: int) -> TowerBlock:
    """Translate a block."""
    assert isinstance(block, siglip.Block | sam.Block)
    attn, mlp = block.attn, block.mlp
    out = TowerBlock(norm1=_norm(block.norm1), norm2=_norm(block.norm2), side=grid)
    out.qkv, out.proj, out.fc1, out.fc2 = map(_linear, (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
    out.curve = CURVES[mlp.approximate]
    if isinstance(attn, WindowAttention):
        out.rows, out.columns = attn.rel_pos_h.data_ptr(), attn.rel_pos_w.data_ptr()
        out.side = attn.side
    return out


def _linear(layer: nn.Linear | QuantizedLinear) -> Matrix:
    """Translate a linear layer."""
    assert layer.bias is not None
    if isinstance(layer, QuantizedLinear):
        weight, kind = layer.packed, NUMBERS[layer.kind]
    else:
        weight, kind = layer.weight, DTYPES[layer.weight.dtype]
    return Matrix(
        weight=weight.data_ptr(),
        bias=layer.bias.data_ptr(),
        rows=layer.out_features,
        width=layer.in_features,
        kind=kind,
    )


def _norm(norm: nn.LayerNorm) -> LayerNorm:
    """Translate a norm."""
    return LayerNorm(weight=norm.weight.data_ptr(), bias=norm.bias.data_ptr(), eps=norm.eps)
