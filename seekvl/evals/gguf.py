"""The language model of DeepSeek-VL as a GGUF file, which llama.cpp reads: its LLaMA, without a vocabulary.

llama.cpp turns neighbouring channels of a head, here channel i goes with channel i + e/2 (`llama.rotate`):
the rows of the query and key matrices change places, and every score stays what it was.

    here   0 1 2 3 | 4 5 6 7        llama.cpp   0 4 1 5 2 6 3 7

Letters: h heads, e width of a head, o rows and i columns of a matrix.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from seekvl.models.llama import Layer, Llama, LlamaConfig
from seekvl.models.quantized import Kind
from seekvl.runtime import SeekVLError, require

if TYPE_CHECKING:
    import numpy as np

FORMATS: dict[Kind | torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "F16",
    "int8": "Q8_0",
    "int4": "Q4_0",
}
"""What stands for our dtypes and kinds: Q8_0 has a scale for 32 weights, Q4_0 the 4.5 bits that int4 has."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}
"""Numbers by which a file names its format (`LlamaFileType` of the gguf package)."""


def write_gguf(network: Llama, path: Path, *, kind: Kind | None = None) -> None:
    """Write a language model of plain weights, one matrix at a time, all matrices in one format.

    kind: "int8" or "int4"; None keeps the dtype, bfloat16 as float16. The embedding keeps it in any case, as
    `weights.quantize` does it, and norms are float32, which is what llama.cpp wants.

    Raises SeekVLError for numbers that the format does not have, and without the package gguf.
    """
    gguf = require("gguf", extra="llama")
    plain = FORMATS[network.embed_tokens.weight.dtype]
    chosen = plain if kind is None else FORMATS[kind]
    formats = {name: _format(name, tensor, plain, chosen) for name, tensor in _tensors(network)}
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, network.config, file_type=FILE_TYPES[chosen])
    for name, tensor in _tensors(network):
        kept = gguf.GGMLQuantizationType[formats[name]]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kept]
        if tensor.shape[-1] % per_block:
            raise SeekVLError(
                f"{name} has rows of {tensor.shape[-1]:,} numbers, {kept.name} takes {per_block} at a time"
            )
        size = tensor.numel() // per_block * block_bytes
        writer.add_tensor_info(name, tuple(tensor.shape), None, size, raw_dtype=kept)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(network):
            writer.write_tensor_data(_stored(name, tensor, formats[name]))
    finally:
        writer.close()


def _describe(writer: Any, config: LlamaConfig, *, file_type: int) -> None:
    """Write the dimensions."""
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(file_type)


def _tensors(network: Llama) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under llama.cpp's name, made as it is asked for."""
    yield "token_embd.weight", network.embed_tokens.weight
    yield "output_norm.weight", network.norm.weight
    yield "output.weight", network.lm_head.weight
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        attn, mlp = layer.attn, layer.mlp
        found = {
            "attn_norm": layer.attn_norm.weight,
            "attn_q": _turned(attn.q_proj.weight, heads=attn.heads),
            "attn_k": _turned(attn.k_proj.weight, heads=attn.kv_heads),
            "attn_v": attn.v_proj.weight,
            "attn_output": attn.o_proj.weight,
            "ffn_norm": layer.mlp_norm.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        for name, tensor in found.items():
            yield f"blk.{index}.{name}.weight", tensor


def _turned(weight: Tensor, *, heads: int) -> Tensor:
    """Put the rows of f[o, i] in llama.cpp's order, see above.

    >>> _turned(torch.arange(8.0)[:, None], heads=2).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    return rearrange(weight, "(h two e) i -> (h e two) i", h=heads, two=2)


def _format(name: str, tensor: Tensor, plain: str, chosen: str) -> str:
    """Return the format of a tensor."""
    if tensor.dim() == 1:
        return "F32"
    return plain if name == "token_embd.weight" else chosen


def _stored(name: str, tensor: Tensor, kept: str) -> "np.ndarray[Any, Any]":
    """Return a tensor as the file holds it."""
    gguf = require("gguf", extra="llama")
    numbers = tensor.detach().float()
    largest = float(numbers.abs().max())
    if kept != "F32" and not largest <= torch.finfo(torch.float16).max:  # scales are float16, too
        raise SeekVLError(f"{name} holds numbers up to {largest}; {kept} cannot be made of them")
    found: np.ndarray[Any, Any] = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType[kept])
    return found
