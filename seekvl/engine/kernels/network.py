"""A language model as the compiled step sees it: addresses and sizes.

The weights stay where torch keeps them. A description holds their addresses, so it is only as good as what it
was made from: `Description.stands` tells whether the network is still the same, and costs microseconds.
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from seekvl.engine.kernels.accelerate import (
    KernelExperts,
    KernelLinear,
    KernelQuantizedExperts,
    KernelQuantizedLinear,
)
from seekvl.engine.kernels.packed import NUMBERS
from seekvl.engine.kernels.products import DTYPES
from seekvl.engine.kernels.structures import Layer, Matrix, Network, Norm, Router
from seekvl.models import deepseek_v2, llama
from seekvl.models.deepseek_v2 import DeepseekV2
from seekvl.models.llama import Attention, Llama, Mlp, RmsNorm
from seekvl.models.mla import Mla
from seekvl.models.moe import Experts, Gate, Moe, MoeConfig
from seekvl.models.quantized import (
    STACKS,
    Kind,
    Quantized,
    QuantizedExperts,
    QuantizedLinear,
    packed_shape,
    quantized_modules,
)
from seekvl.models.vl2 import without_memory

PARTS = frozenset(
    (
        *(Llama, DeepseekV2, llama.Layer, deepseek_v2.Layer, Attention, Mla, Mlp, Moe, Gate, RmsNorm),
        *(KernelLinear, KernelExperts, KernelQuantizedLinear, KernelQuantizedExperts),
        *(nn.Embedding, nn.ModuleList),
    )
)
"""What a network may be made of. A subclass of these is somebody else's, and computes as he wants."""

CHOICES = MappingProxyType({"greedy": 0, "group_limited": 1, "noaux_tc": 2})


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter, or the packed weight of a buffer, as it was found."""

    tensor: ReferenceType[Tensor]
    """Weak, so that nothing is kept that the network has given up."""
    address: int
    dtype: torch.dtype
    shape: torch.Size

    def stands(self) -> bool:
        """Whether it is in the same memory, as the same numbers."""
        tensor = self.tensor()
        return (
            tensor is not None
            and tensor.data_ptr() == self.address
            and tensor.dtype is self.dtype
            and tensor.shape == self.shape
            and tensor.is_contiguous()
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """A module as it was found."""

    module: ReferenceType[nn.Module]
    kind: type[nn.Module]
    level: int | None
    children: tuple[int, ...]
    """Identities, which are theirs as long as they live: of that their own entries take care."""
    tensors: tuple[int, ...]
    """The same of parameters and buffers."""
    weights: tuple[_Weight, ...]
    """Those of them that are not None."""

    def stands(self) -> bool:
        """Whether it is what it was, and computes as its class says."""
        module = self.module()
        if type(module) is not self.kind:
            return False
        state = module.__dict__
        return (
            state.get("level") == self.level
            and tuple(map(id, state["_modules"].values())) == self.children
            and not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
            and tuple(map(id, (*state["_parameters"].values(), *state["_buffers"].values()))) == self.tensors
            and all(weight.stands() for weight in self.weights)
        )


@dataclass(frozen=True, slots=True)
class Description:
    """A network and what the library knows of it."""

    network: Network
    level: int
    """Index into `LEVELS`."""
    vocab: int
    """Rows of the embedding."""
    cache_shapes: tuple[tuple[int, int], tuple[int, int]]
    """(heads, width) of keys and of values, see `cache_shape` of the config."""
    _parts: tuple[_Part, ...]
    _kept: tuple[object, ...]
    """Memory that the addresses lead to and no parameter owns."""

    def stands(self) -> bool:
        """Whether the network is still the one described: no module, class, hook or memory has changed."""
        return all(part.stands() for part in self._parts)


def describe(network: Llama | DeepseekV2) -> Description | None:
    """Describe a network whose layers `accelerate` gave to the kernels; None where one step cannot serve it.

    Any linear layer and any experts may be quantised, but not the latent's expansion, whose rows are read one
    head at a time, nor one alone of a gate and its `up`.

    That is so where a part is not of the class of `PARTS`, where plain weights are of different dtypes, where
    weights are not contiguous, elsewhere than on the CPU or of other sizes than the config says, and where
    somebody listens with a hook.
    """
    head, quantized = network.lm_head, quantized_modules(network)
    if not isinstance(head, KernelLinear | KernelQuantizedLinear):
        return None
    parts = tuple(_look(module) for module in network.modules())
    ours = (part.kind in PARTS and part.level in (None, head.level) and part.stands() for part in parts)
    if not (all(ours) and all(map(_plain, network.parameters())) and all(map(_packed, quantized.values()))):
        return None
    weighty = (part for part in parts if part.kind is not Gate and not issubclass(part.kind, Quantized))
    dtypes = {weight.dtype for part in weighty for weight in part.weights}
    if len(dtypes) != 1 or not (_fits(network, quantized) and _joins(quantized)):
        return None
    config = network.config
    layers = (Layer * config.layers)(*(_layer(layer) for layer in network.layers))
    exponent = torch.arange(0, _rotary(network), 2, dtype=torch.float32, device="cpu") / _rotary(network)
    divisors = config.rope_theta**exponent  # as `rotary_table` has them, bit for bit
    return Description(
        network=_network(network, layers=ctypes.addressof(layers), divisors=divisors.data_ptr()),
        level=head.level,
        vocab=len(network.embed_tokens.weight),
        cache_shapes=config.cache_shape,
        _parts=parts,
        _kept=(layers, divisors),
    )


def _look(module: nn.Module) -> _Part:
    """Note what a module is made of."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return _Part(
        module=ref(module),
        kind=type(module),
        level=module.__dict__.get("level"),
        children=tuple(map(id, module._modules.values())),
        tensors=tuple(map(id, tensors)),
        weights=tuple(
            _Weight(ref(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape)
            for tensor in tensors
            if tensor is not None and not tensor.is_meta
        ),
    )


def _plain(weight: Tensor) -> bool:
    """Whether a weight is numbers that the kernels read, in plain memory."""
    return (
        type(weight) is nn.Parameter
        and weight.is_cpu
        and weight.layout == torch.strided
        and weight.dtype in DTYPES
    )


def _packed(module: Quantized) -> bool:
    """Whether a quantised module's weights are bytes in plain memory."""
    return all(
        type(buffer) is Tensor
        and buffer.is_cpu
        and buffer.layout == torch.strided
        and buffer.dtype == torch.uint8
        for buffer in module.buffers()
    )


def _rotary(network: Llama | DeepseekV2) -> int:
    """Return the channels of a head that carry the position."""
    config = network.config
    return config.rope_width if isinstance(config, deepseek_v2.DeepseekV2Config) else config.head_width


def _network(network: Llama | DeepseekV2, *, layers: int, divisors: int) -> Network:
    """Fill in the dimensions."""
    config = network.config
    mla = config.mla if isinstance(config, deepseek_v2.DeepseekV2Config) else None
    moe = config.moe if isinstance(config, deepseek_v2.DeepseekV2Config) else None
    rotary = _rotary(network)
    return Network(
        width=config.width,
        layer_count=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        rotary=rotary,
        nope=0 if mla is None else mla.nope_width,
        latent=0 if mla is None else mla.kv_rank,
        value=rotary if mla is None else mla.value_width,
        scale=config.head_width**-0.5,
        divisors=divisors,
        router=Router() if moe is None else _router(moe),
        layers=layers,
        norm=_norm(network.norm),
        embed=_matrix(network.embed_tokens.weight),
        head=_linear(network.lm_head),
    )


def _router(moe: MoeConfig) -> Router:
    """Translate the config of the experts."""
    return Router(
        experts=moe.experts,
        active=moe.active,
        groups=moe.groups,
        kept_groups=moe.kept_groups,
        choice=CHOICES[moe.choice],
        sigmoid=moe.scoring == "sigmoid",
        normalise=moe.normalise,
        scale=moe.scale,
    )


def _layer(layer: nn.Module) -> Layer:
    """Translate a layer of either network."""
    assert isinstance(layer, llama.Layer | deepseek_v2.Layer)
    out = Layer(attn_norm=_norm(layer.attn_norm), mlp_norm=_norm(layer.mlp_norm))
    attn, mlp = layer.attn, layer.mlp
    out.q, out.o = _linear(attn.q_proj), _linear(attn.o_proj)
    if isinstance(attn, Mla):
        out.kv_a, out.kv_b = _linear(attn.kv_a_proj), _linear(attn.kv_b_proj)
        out.latent_norm = _norm(attn.kv_a_norm)
    else:
        out.k, out.v = _linear(attn.k_proj), _linear(attn.v_proj)
    if isinstance(mlp, Moe):
        experts, gate = mlp.experts, mlp.gate
        out.router = _matrix(gate.weight)
        if gate.bias is not None:
            out.router_bias, out.router_bias_kind = gate.bias.data_ptr(), DTYPES[gate.bias.dtype]
        out.expert_gate, out.expert_up, out.expert_down = (_stack(experts, name) for name in STACKS)
    dense = mlp.shared if isinstance(mlp, Moe) else mlp
    if dense is not None:
        out.gate, out.up, out.down = (_linear(x) for x in (dense.gate_proj, dense.up_proj, dense.down_proj))
    return out


def _matrix(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """Translate a matrix f[o, i] or a stack f[E, o, i]."""
    return Matrix(
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=weight.shape[-2],
        width=weight.shape[-1],
        kind=DTYPES[weight.dtype],
    )


def _linear(layer: nn.Linear | QuantizedLinear) -> Matrix:
    """Translate a linear layer."""
    if isinstance(layer, QuantizedLinear):
        return _packed_matrix(layer.packed, layer.kind, rows=layer.out_features, width=layer.in_features)
    return _matrix(layer.weight, layer.bias)


def _stack(experts: Experts | QuantizedExperts, name: str) -> Matrix:
    """Translate the matrices of experts that bear a name."""
    if isinstance(experts, QuantizedExperts):
        rows, width = experts.shape(name)
        return _packed_matrix(experts.get_buffer(name), experts.kind, rows=rows, width=width)
    return _matrix(getattr(experts, name))


def _packed_matrix(packed: Tensor, kind: Kind, *, rows: int, width: int) -> Matrix:
    """Translate a matrix u8[T, S] or a stack u8[E, T, S]."""
    return Matrix(weight=packed.data_ptr(), rows=rows, width=width, kind=NUMBERS[kind])


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of parameters and packed weights; what bears two names is there twice."""
    named = (network.named_parameters, network.named_buffers)
    return {name: tuple(tensor.shape) for of in named for name, tensor in of(remove_duplicate=False)}


def _norm(norm: RmsNorm) -> Norm:
    """Translate a norm."""
    return Norm(weight=norm.weight.data_ptr(), kind=DTYPES[norm.weight.dtype], eps=norm.eps)


def _joins(quantized: Mapping[str, Quantized]) -> bool:
    """Whether each gate is stored as the `up` beside it, and no expansion of a latent is quantised."""
    kinds = {name: module.kind for name, module in quantized.items()}
    return all(
        _last(name) != "kv_b_proj" and kinds.get(name.removesuffix(_last(name)) + _partner(name)) == kind
        for name, kind in kinds.items()
    )


def _last(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]


def _partner(name: str) -> str:
    """Return the last part of the name of what is read together with a module: itself, or gate and up."""
    return {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(_last(name), _last(name))


def _fits(network: Llama | DeepseekV2, quantized: Mapping[str, Quantized]) -> bool:
    """Whether all weights have the sizes that the config gives them: the library trusts it.

    Embedding and head may have any number of rows, as after tokens were added.
    """
    expected = _expected(network)
    expected.lm_head.out_features = network.lm_head.out_features
    modules = dict(expected.named_modules(remove_duplicate=False))
    wanted = _shapes(expected)
    for name, module in quantized.items():
        packed = _packed_shapes(module, modules.get(name))
        if packed is None:
            return False
        for key in ("weight", *STACKS):
            wanted.pop(f"{name}.{key}", None)
        wanted |= {f"{name}.{key}": shape for key, shape in packed.items()}
    found = _shapes(network)
    free = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), 1)  # axes that may be of any length
    return found.keys() == wanted.keys() and all(
        shape[free.get(name, 0) :] == wanted[name][free.get(name, 0) :] for name, shape in found.items()
    )


def _packed_shapes(module: Quantized, plain: nn.Module | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the weights of a quantised module that takes the place of a plain one; None where
    it cannot.
    """
    if isinstance(module, QuantizedLinear):
        rows, width = module.out_features, module.in_features
        if not isinstance(plain, nn.Linear) or (plain.out_features, plain.in_features) != (rows, width):
            return None
        return {"packed": packed_shape(module.kind, rows, width)}
    sizes = (module.count, module.width, module.channels)
    if not isinstance(plain, Experts) or tuple(plain.gate_proj.shape) != sizes:
        return None
    return {name: (module.count, *packed_shape(module.kind, *module.shape(name))) for name in STACKS}


def _expected(network: Llama | DeepseekV2) -> Llama | DeepseekV2:
    """Build the network of a config without memory. Layers that are alike are one layer under several names:
    building each takes longer than all else that is looked at here.
    """
    config = network.config
    alike: dict[bool, nn.Module] = {}
    kinds = [
        isinstance(config, deepseek_v2.DeepseekV2Config) and config.has_experts(layer)
        for layer in range(config.layers)
    ]
    with without_memory():
        if isinstance(config, llama.LlamaConfig):
            expected: Llama | DeepseekV2 = Llama(replace(config, layers=1))
            alike[False] = expected.layers[0]
        else:
            expected = DeepseekV2(replace(config, layers=1))
            alike = {kind: deepseek_v2.Layer(config, layer=kinds.index(kind)) for kind in set(kinds)}
    expected.layers = nn.ModuleList(alike[kind] for kind in kinds)
    return expected
