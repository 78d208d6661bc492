"""The structures of src/step.h, src/prompt.h and src/tower.h, field by field: how the library is told of a
network and of its work.

Addresses are plain numbers; whoever fills a structure keeps alive what they lead to.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p


class Matrix(ctypes.Structure):
    """A matrix [rows, width], or a stack of them."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("kind", c_int64),
    )


class Norm(ctypes.Structure):
    """A root-mean-square norm."""

    _fields_ = (("weight", c_void_p), ("kind", c_int64), ("eps", c_double))


class Layer(ctypes.Structure):
    """A decoder layer; what it has not is zero."""

    _fields_ = (
        *((name, Norm) for name in ("attn_norm", "mlp_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "kv_a", "kv_b")),
        ("latent_norm", Norm),
        *((name, Matrix) for name in ("gate", "up", "down", "router")),
        ("router_bias", c_void_p),
        ("router_bias_kind", c_int64),
        *((name, Matrix) for name in ("expert_gate", "expert_up", "expert_down")),
    )


class Router(ctypes.Structure):
    """What `MoeConfig` says of the router."""

    _fields_ = (
        *((name, c_int64) for name in ("experts", "active", "groups", "kept_groups")),
        *((name, c_int64) for name in ("choice", "sigmoid", "normalise")),
        ("scale", c_double),
    )


class Network(ctypes.Structure):
    """All of it."""

    _fields_ = (
        *((name, c_int64) for name in ("width", "layer_count", "heads", "kv_heads")),
        *((name, c_int64) for name in ("rotary", "nope", "latent", "value")),
        ("scale", c_double),
        ("divisors", c_void_p),
        ("router", Router),
        ("layers", c_void_p),
        ("norm", Norm),
        ("embed", Matrix),
        ("head", Matrix),
    )


class Cache(ctypes.Structure):
    """The buffers of a cache; `keys` and `values` are addresses of arrays of addresses."""

    _fields_ = (("kind", c_int64), ("capacity", c_int64), ("keys", c_void_p), ("values", c_void_p))


class Tokens(ctypes.Structure):
    """New tokens: addresses of arrays of n numbers."""

    _fields_ = (("n", c_int64), ("ids", c_void_p), ("slots", c_void_p), ("positions", c_void_p))


class Prompt(ctypes.Structure):
    """A piece of a prompt: n embeddings of one row, and where results go, which may be nowhere."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "slot", "start")),
        ("embeds", c_void_p),
        ("kind", c_int64),
        ("hidden", c_void_p),
        ("logits", c_void_p),
    )


class LayerNorm(ctypes.Structure):
    """A norm with a bias."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_double))


class TowerBlock(ctypes.Structure):
    """A block of a vision tower; `rows` and `columns` are tables of learned distances, or nowhere."""

    _fields_ = (
        *((name, LayerNorm) for name in ("norm1", "norm2")),
        *((name, Matrix) for name in ("qkv", "proj", "fc1", "fc2")),
        ("rows", c_void_p),
        ("columns", c_void_p),
        ("side", c_int64),
        ("curve", c_int64),
    )


class Tower(ctypes.Structure):
    """The blocks of a vision tower."""

    _fields_ = (
        *((name, c_int64) for name in ("kind", "width", "heads", "hidden")),
        *((name, c_int64) for name in ("grid", "window", "block_count")),
        ("blocks", c_void_p),
        ("norm", LayerNorm),
    )


class Views(ctypes.Structure):
    """Embedded patches of n pictures, and where results go; `branch` may be nowhere."""

    _fields_ = (
        ("n", c_int64),
        *((name, c_void_p) for name in ("x", "y", "branch")),
        ("branch_block", c_int64),
    )


def total_bytes() -> int:
    """Return what `seekvl_structures` of a library must say that was compiled from the same headers."""
    kinds = (Network, Layer, Cache, Tokens, Prompt, Tower, TowerBlock, Views)
    return sum(ctypes.sizeof(kind) for kind in kinds)
