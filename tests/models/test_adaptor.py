import pytest
import torch
import torch.nn.functional as F

from seekvl.models.adaptor import Adaptor, AdaptorConfig
from seekvl.runtime import SeekVLError


def test_mlp_is_linear_gelu_linear() -> None:
    adaptor = Adaptor(AdaptorConfig(kind="mlp_gelu", input_width=6, width=10))
    x = torch.randn(2, 4, 6)
    first, second = adaptor.layers
    assert torch.equal(adaptor(x), second(F.gelu(first(x))))


def test_depth_counts_the_linear_layers() -> None:
    shapes = {
        kind: [
            tuple(p.shape)
            for p in Adaptor(AdaptorConfig(kind=kind, input_width=6, width=10, depth=3)).parameters()
            if p.dim() == 2
        ]
        for kind in ("mlp_gelu", "linear", "low_high_hybrid_split_mlp_gelu")
    }
    assert shapes == {
        "mlp_gelu": [(10, 6), (10, 10), (10, 10)],
        "linear": [(10, 6)],
        "low_high_hybrid_split_mlp_gelu": [(5, 6), (5, 6), (10, 10), (10, 10)],
    }


def test_hybrid_puts_the_high_half_first() -> None:
    adaptor = Adaptor(AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=6, width=10))
    high, low = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    expected = adaptor.layers[0](F.gelu(torch.cat((adaptor.high_up(high), adaptor.low_up(low)), -1)))
    assert torch.equal(adaptor((high, low)), expected)
    assert not torch.allclose(adaptor((low, high)), expected)


def test_identity_passes_through() -> None:
    x = torch.randn(1, 2, 6)
    assert torch.equal(Adaptor(AdaptorConfig(kind="identity", input_width=6, width=6))(x), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "gready", "input_width": 4, "width": 4}, "unknown"),
        ({"kind": "linear", "input_width": 4, "width": 4, "depth": 0}, "depth 0"),
        ({"kind": "identity", "input_width": 4, "width": 6}, "identity"),
        ({"kind": "low_high_hybrid_split_mlp_gelu", "input_width": 4, "width": 5}, "halves"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        AdaptorConfig(**fields)  # type: ignore[arg-type]


def test_the_wrong_number_of_towers_is_refused() -> None:
    single = Adaptor(AdaptorConfig(kind="linear", input_width=4, width=4))
    with pytest.raises(SeekVLError, match="two towers"):
        single((torch.rand(1, 1, 4), torch.rand(1, 1, 4)))
    hybrid = Adaptor(AdaptorConfig(kind="low_high_hybrid_split_mlp_gelu", input_width=4, width=4))
    with pytest.raises(SeekVLError, match="one tower"):
        hybrid(torch.rand(1, 1, 4))
