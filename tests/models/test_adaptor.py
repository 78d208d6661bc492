import pytest
import torch
import torch.nn.functional as F

from seekvl.models.adaptor import Adaptor, AdaptorConfig, resize_grid, space_to_depth
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
        (
            {"kind": "low_high_hybrid_split_mlp_gelu", "input_width": 4, "width": 4, "token_pooling": True},
            "no token pooling",
        ),
        ({"kind": "downsample_mlp_gelu", "input_width": 4, "width": 4, "depth": 1}, "depth 1 is below 2"),
        ({"kind": "downsample_mlp_gelu", "input_width": 4, "width": 4, "downsample": 0}, "downsample 0"),
        ({"kind": "mlp_gelu", "input_width": 4, "width": 4, "downsample": 2}, "takes no downsample 2"),
        ({"kind": "linear", "input_width": 4, "width": 4, "mlp_ratio": 2}, "mlp_ratio 2"),
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


def slow_windows(x: torch.Tensor, side: int, *, grid: int) -> torch.Tensor:
    """Window by window, channel by channel; places outside the grid are 0."""
    rows = []
    for y in range(0, grid, side):
        for left in range(0, grid, side):
            row = []
            for channel in range(x.shape[2]):
                for dy in range(side):
                    for dx in range(side):
                        inside = y + dy < grid and left + dx < grid
                        place = (y + dy) * grid + left + dx
                        row.append(x[:, place, channel] if inside else torch.zeros(len(x)))
            rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("grid", [4, 5])
def test_downsampling_lays_the_channels_of_a_window_together(grid: int) -> None:
    torch.manual_seed(0)
    config = AdaptorConfig(kind="downsample_mlp_gelu", input_width=3, width=10, downsample=2)
    adaptor = Adaptor(config)
    x = torch.randn(2, grid * grid, 3)
    first, second = adaptor.layers
    expected = second(F.gelu(first(slow_windows(x, 2, grid=grid))))
    assert expected.shape[1] == config.out_grid(grid) ** 2
    torch.testing.assert_close(adaptor(x), expected, rtol=0, atol=1e-6)


def test_space_to_depth_equals_unfold() -> None:
    x = torch.randn(2, 36, 5)
    picture = x.transpose(1, 2).unflatten(2, (6, 6))
    assert torch.equal(space_to_depth(x, 3), F.unfold(picture, 3, stride=3).transpose(1, 2))
    with pytest.raises(SeekVLError, match="35 features do not make a square"):
        space_to_depth(x[:, :35], 3)
    with pytest.raises(SeekVLError, match="4 x 4 windows"):
        space_to_depth(x, 4)


def test_published_vl2_shapes() -> None:
    config = AdaptorConfig(kind="downsample_mlp_gelu", input_width=1152, width=1280, downsample=2)
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in Adaptor(config).parameters()]
    assert shapes == [(1280, 4608), (1280,), (1280, 1280), (1280,)]
    assert config.out_grid(27) == 14


def test_hidden_width_and_depth_of_the_downsampling_kind() -> None:
    adaptor = Adaptor(
        AdaptorConfig(kind="downsample_mlp_gelu", input_width=3, width=10, depth=3, downsample=2, mlp_ratio=2)
    )
    assert [tuple(layer.weight.shape) for layer in adaptor.layers] == [(20, 12), (20, 20), (10, 20)]


def test_token_pooling_comes_first_and_loses_an_odd_row() -> None:
    config = AdaptorConfig(kind="linear", input_width=3, width=10, token_pooling=True)
    adaptor = Adaptor(config)
    x = torch.randn(2, 25, 3)
    even = x.unflatten(1, (5, 5))[:, :4, :4].flatten(1, 2)
    expected = adaptor.layers[0](adaptor.token_pooling_layer(slow_windows(even, 2, grid=4)))
    torch.testing.assert_close(adaptor(x), expected, rtol=0, atol=1e-6)
    assert config.out_grid(5) == 2


def test_a_grid_grows_by_zeros_at_bottom_and_right() -> None:
    grown = resize_grid(torch.tensor([[[1.0], [2], [3], [4]]]), 3)
    assert grown.flatten().tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]
