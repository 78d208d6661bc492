"""Linear layers and experts whose weights are whole numbers of eight or four bits.

    int8    a scale for each row of the matrix; values -127..127
    int4    a scale for each row and 32 inputs; values -8..7

Both lie in memory as the CPU kernels read them: 16 rows make a tile, and a tile is one stream. `[16][4]` is
a line of 64 bytes, four inputs of each of the 16 rows. The width is filled up with zeros to a multiple of 64,
the last tile with rows of zeros. Bytes hold value + 128, nibbles value + 8:

    int8    float32[16] scales | of every 4 inputs a line
    int4    of every 64 inputs: bfloat16[2][16] scales | 4 lines of the first 32, 4 lines of the second 32;
            the low bits of line l are the inputs 4 l + 0..3 of the 32, the high bits 16 + 4 l + 0..3

Inputs are rounded too, as they arrive: to 127 steps of the largest in a group of 128 (int8) or 32 (int4).

What stands here unpacks a matrix whenever it is needed, on any device: slow, and what the products of
`engine.kernels`, which take its place, are compared with. There is no gradient.

Letters: o rows of a matrix, i inputs, O and I filled up, T tiles, S bytes of a tile, G groups of 32 inputs, E
experts, n tokens, k experts a token.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seekvl.models.moe import Experts
from seekvl.runtime import SeekVLError

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of quantised matrices, in the order the kernels number them."""

TILE_ROWS = 16
UNIT = 64
"""Inputs that a width is a multiple of, once filled up."""
GROUP = 32
"""Inputs that share a scale in int4."""
RANGE: dict[Kind, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""Least and largest value."""
INPUT_GROUP: dict[Kind, int] = {"int8": 128, "int4": 32}
"""Inputs that are rounded by one scale."""
STACKS = ("gate_proj", "up_proj", "down_proj")
"""Names of the matrices of experts."""
SMALLEST_INPUT = 2.0**-100
"""Largest magnitude below which a group of inputs counts as zero."""


def tile_bytes(kind: Kind, width: int) -> int:
    """Return the bytes S of a tile of this width i.

    >>> tile_bytes("int8", 64), tile_bytes("int4", 65)
    (1088, 1152)
    """
    units = -(-width // UNIT)
    return 64 + TILE_ROWS * UNIT * units if kind == "int8" else 576 * units


def packed_shape(kind: Kind, rows: int, width: int) -> tuple[int, int]:
    """Return the shape (T, S) of a packed matrix [rows, width].

    >>> packed_shape("int4", 17, 64)
    (2, 576)
    """
    return -(-rows // TILE_ROWS), tile_bytes(kind, width)


def pack(values: Tensor, scales: Tensor, *, kind: Kind) -> Tensor:
    """Lay a matrix out as the kernels read it: u8[T, S] of whole numbers [o, i].

    scales: f32[o] for int8, f32[o, G] with G = ceil(i / 32) for int4, where they are rounded to bfloat16.

    Raises SeekVLError for values outside of the kind's range and for shapes that do not fit.
    """
    o, i = values.shape
    groups = () if kind == "int8" else (-(-i // GROUP),)
    if scales.shape != (o, *groups):
        raise SeekVLError(
            f"{kind} values {list(values.shape)} need scales {[o, *groups]}, not {list(scales.shape)}"
        )
    (least, most), (low, high) = RANGE[kind], (int(side) for side in values.aminmax())
    if low < least or high > most:
        raise SeekVLError(f"{kind} holds {least}..{most}, not {low}..{high}")
    zero = 128 if kind == "int8" else 8
    filled = F.pad(values.to(torch.int16), (0, -i % UNIT, 0, -o % TILE_ROWS)) + zero  # O I
    scales = F.pad(scales.float(), (*((0, -i % UNIT // GROUP) if groups else ()), 0, -o % TILE_ROWS))
    if kind == "int8":
        lines = rearrange(filled, "(T r) (q j) -> T (q r j)", r=TILE_ROWS, j=4).to(torch.uint8)
        return torch.cat((scales.view(-1, TILE_ROWS).view(torch.uint8), lines), dim=1)
    low_bits, high_bits = rearrange(
        filled, "(T r) (u g half l j) -> half T u (g l r j)", r=TILE_ROWS, g=2, half=2, l=4, j=4
    )
    lines = (low_bits | high_bits << 4).to(torch.uint8)  # T u 512
    bits = rearrange(scales.bfloat16(), "(T r) (u g) -> T u (g r)", r=TILE_ROWS, g=2).contiguous()
    return torch.cat((bits.view(torch.uint8), lines), dim=2).flatten(1)


def unpack(packed: Tensor, *, kind: Kind, rows: int, width: int) -> Tensor:
    """Return the numbers f32[o, i] a packed matrix u8[T, S] stands for."""
    if kind == "int8":
        scales = packed[:, :64].contiguous().view(torch.float32).flatten()  # O
        lines = packed[:, 64:].to(torch.int16) - 128
        values = rearrange(lines, "T (q r j) -> (T r) (q j)", r=TILE_ROWS, j=4)  # O I
        return (values * scales[:, None])[:rows, :width]
    units = torch.unflatten(packed, 1, (-1, 576))  # T u 576
    bits = units[:, :, :64].contiguous().view(torch.bfloat16).float()  # T u (g r)
    lines = torch.stack((units[:, :, 64:] & 15, units[:, :, 64:] >> 4)).to(torch.int16) - 8  # half T u 512
    values = rearrange(lines, "half T u (g l r j) -> (T r) (u g half l j)", g=2, l=4, r=TILE_ROWS, j=4)
    scales = rearrange(bits, "T u (g r) -> (T r) (u g)", g=2)  # O G
    return (values * scales.repeat_interleave(GROUP, dim=1))[:rows, :width]


def scales_of(packed: Tensor, *, kind: Kind) -> Tensor:
    """Return all scales in packed matrices u8[..., T, S], in the order of memory: float32 or bfloat16."""
    if kind == "int8":
        return packed[..., :64].contiguous().view(torch.float32)
    return torch.unflatten(packed, -1, (-1, 576))[..., :64].contiguous().view(torch.bfloat16)


def rounded_inputs(x: Tensor, *, kind: Kind) -> Tensor:
    """Return x[..., i] as the products see it, in float32; a group that is not finite becomes NaN.

    >>> rounded_inputs(torch.tensor([127.0, 0.4, -63.6]), kind="int8")
    tensor([127.,   0., -64.])
    """
    size, width = INPUT_GROUP[kind], x.shape[-1]
    groups = torch.unflatten(F.pad(x.float(), (0, -width % size)), -1, (-1, size))  # ... g size
    most = groups.abs().amax(dim=-1, keepdim=True)  # ... g 1
    inverse = most.new_tensor(127.0) / most  # a plain 127.0 / most is a reciprocal, rounded twice
    steps = (groups * inverse).round() * (most / 127.0)
    steps = steps.where(most >= SMALLEST_INPUT, 0.0).where(most.isfinite(), torch.nan)
    return steps.flatten(-2)[..., :width]


def _without_gradient(x: Tensor) -> Tensor:
    """Refuse an input that wants a gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        raise SeekVLError(
            "a quantised layer gives no gradient: train the checkpoint it was made from, and quantise that"
        )
    return x


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight; it is made empty and filled by loading or quantising."""

    packed: Tensor
    """u8[T, S]."""
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kind: Kind,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        shape = packed_shape(kind, out_features, in_features)
        self.register_buffer("packed", torch.empty(shape, dtype=torch.uint8, device=device))
        self.bias = bias

    def unpacked(self) -> Tensor:
        """Return the weight f32[o, i]."""
        return unpack(self.packed, kind=self.kind, rows=self.out_features, width=self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return f[..., o] of x[..., i]."""
        x = _without_gradient(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rounded_inputs(x, kind=self.kind), self.unpacked(), bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Say the dimensions."""
        return f"{self.in_features}, {self.out_features}, kind={self.kind}, bias={self.bias is not None}"


class QuantizedExperts(nn.Module):
    """Routed experts with packed weights, in the place of `Experts`."""

    gate_proj: Tensor
    """u8[E, T, S] of matrices [width, channels]; up_proj alike."""
    up_proj: Tensor
    down_proj: Tensor
    """u8[E, T, S] of matrices [channels, width]."""

    def __init__(
        self, count: int, *, channels: int, width: int, kind: Kind, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.count, self.channels, self.width, self.kind = count, channels, width, kind
        for name in STACKS:
            shape = (count, *packed_shape(kind, *self.shape(name)))
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8, device=device))

    def shape(self, name: str) -> tuple[int, int]:
        """Return rows and inputs of each matrix of a stack."""
        return (self.channels, self.width) if name == "down_proj" else (self.width, self.channels)

    def unpacked(self, name: str, expert: int) -> Tensor:
        """Return one matrix f32[o, i] of a stack."""
        rows, width = self.shape(name)
        return unpack(self.get_buffer(name)[expert], kind=self.kind, rows=rows, width=width)

    def forward(self, x: Tensor, *, experts: Tensor, weights: Tensor) -> Tensor:
        """Return f[n, d]: what experts i64[n, k] make of x[n, d], summed in float32 by weights f32[n, k]."""
        seen = rounded_inputs(_without_gradient(x), kind=self.kind)
        outputs = seen.new_empty((*experts.shape, self.channels))  # n k d
        for expert in sorted(set(experts.flatten().tolist())):
            token, slot = (experts == expert).nonzero(as_tuple=True)
            gate, up, down = (self.unpacked(name, expert) for name in STACKS)
            hidden = F.silu(F.linear(seen[token], gate)) * F.linear(seen[token], up)
            outputs[token, slot] = F.linear(rounded_inputs(hidden, kind=self.kind), down)
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


Quantized = QuantizedLinear | QuantizedExperts


def quantized_like(module: nn.Module, kind: Kind) -> Quantized:
    """Return an empty quantised module that takes the place of a linear layer or of experts, on its device.

    Raises SeekVLError for another module.
    """
    if isinstance(module, nn.Linear):
        return QuantizedLinear(
            module.in_features,
            module.out_features,
            kind=kind,
            bias=module.bias,
            device=module.weight.device,
        )
    if isinstance(module, Experts):
        count, width, channels = module.gate_proj.shape
        return QuantizedExperts(
            count, channels=channels, width=width, kind=kind, device=module.gate_proj.device
        )
    raise SeekVLError(f"a {type(module).__name__} cannot be quantised; linear layers and experts can")


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """Return name -> module of everything quantised in a network."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | QuantizedExperts)
    }
