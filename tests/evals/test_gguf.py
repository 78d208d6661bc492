from pathlib import Path

import pytest
import torch

from seekvl.evals.gguf import write_gguf
from seekvl.models.llama import Llama, LlamaConfig, rotary_table, rotate
from seekvl.models.quantized import Kind
from seekvl.runtime import SeekVLError

gguf = pytest.importorskip("gguf", reason="the package gguf, of the extras llama and dev, is not installed")

CONFIG = LlamaConfig(
    vocab_size=70, width=64, layers=2, heads=4, kv_heads=2, mlp_width=96, max_positions=99, rope_theta=500.0
)


def network(dtype: torch.dtype = torch.float32) -> Llama:
    made = Llama(CONFIG)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return made.to(dtype)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor in float32, in the order o, i."""
    return {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_are_all_there(dtype: torch.dtype, tmp_path: Path) -> None:
    model = network(dtype)
    write_gguf(model, tmp_path / "plain.gguf")
    found = read(tmp_path / "plain.gguf")
    assert len(found) == len(list(model.parameters()))
    assert sum(tensor.numel() for tensor in found.values()) == sum(map(torch.numel, model.parameters()))
    wanted = {
        "token_embd": model.embed_tokens,
        "output": model.lm_head,
        "output_norm": model.norm,
        "blk.1.attn_norm": model.get_submodule("layers.1.attn_norm"),
        "blk.1.attn_v": model.get_submodule("layers.1.attn.v_proj"),
        "blk.0.attn_output": model.get_submodule("layers.0.attn.o_proj"),
        "blk.0.ffn_norm": model.get_submodule("layers.0.mlp_norm"),
        "blk.0.ffn_gate": model.get_submodule("layers.0.mlp.gate_proj"),
        "blk.1.ffn_up": model.get_submodule("layers.1.mlp.up_proj"),
        "blk.1.ffn_down": model.get_submodule("layers.1.mlp.down_proj"),
    }
    for name, module in wanted.items():
        weight = module.get_parameter("weight").float()
        assert torch.allclose(found[f"{name}.weight"], weight, atol=1e-6, rtol=0), name
    types = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "plain.gguf").tensors
    }
    plain = "F32" if dtype == torch.float32 else "F16"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == plain
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def test_neighbouring_channels_turned_give_the_same_scores(tmp_path: Path) -> None:
    model = network()
    write_gguf(model, tmp_path / "plain.gguf")
    found = read(tmp_path / "plain.gguf")
    x = torch.randn(5, CONFIG.width, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_table(torch.arange(5)[None], width=16, theta=CONFIG.rope_theta)
    for head in range(4):
        ours, theirs = [], []
        for name, number in (("q", head), ("k", head // 2)):
            part = slice(16 * number, 16 * number + 16)
            weight = model.get_submodule(f"layers.1.attn.{name}_proj").get_parameter("weight")
            ours.append(rotate((x @ weight[part].T)[None, None], cos, sin)[0, 0])
            pairs = torch.view_as_complex(
                (x @ found[f"blk.1.attn_{name}.weight"][part].T).unflatten(1, (8, 2)).contiguous()
            )
            theirs.append(torch.view_as_real(pairs * torch.complex(cos, sin)[0, 0]).flatten(1))
        assert torch.allclose(ours[0] @ ours[1].T, theirs[0] @ theirs[1].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "name", "error"), [("int8", "Q8_0", 0.01), ("int4", "Q4_0", 0.12)])
def test_whole_numbers_are_llama_cpps_own(kind: Kind, name: str, error: float, tmp_path: Path) -> None:
    model = network(torch.bfloat16)
    write_gguf(model, tmp_path / "packed.gguf", kind=kind)
    types = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "packed.gguf").tensors
    }
    assert types.pop("token_embd.weight") == "F16"
    assert {kept for tensor, kept in types.items() if "norm" not in tensor} == {name}
    found, weight = read(tmp_path / "packed.gguf")["output.weight"], model.lm_head.weight.float()
    assert 0 < float((found - weight).norm() / weight.norm()) < error


def test_dimensions_are_written(tmp_path: Path) -> None:
    write_gguf(network(), tmp_path / "plain.gguf")
    fields = gguf.GGUFReader(tmp_path / "plain.gguf").fields
    wanted = {
        "llama.context_length": 99,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500.0,
        "llama.vocab_size": 70,
        "general.file_type": 0,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)


def test_numbers_that_the_format_has_not(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    write_gguf(model, tmp_path / "plain.gguf")
    assert read(tmp_path / "plain.gguf")["output.weight"][3, 4] == 1e6
    with pytest.raises(SeekVLError, match=r"output\.weight holds numbers up to 999424\.0; F16 cannot"):
        write_gguf(model.bfloat16(), tmp_path / "half.gguf")
    narrow = Llama(LlamaConfig(vocab_size=9, width=48, layers=1, heads=2, kv_heads=2, mlp_width=64))
    with pytest.raises(SeekVLError, match=r"output\.weight has rows of 48 numbers, Q8_0 takes 32 at a time"):
        write_gguf(narrow, tmp_path / "narrow.gguf", kind="int8")
