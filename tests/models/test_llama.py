import pytest
import torch
from torch import Tensor

from seekvl.models.llama import Llama, LlamaConfig, RmsNorm, packed_mask, rotary_table, rotate
from seekvl.runtime import SeekVLError

CONFIG = LlamaConfig(vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)


class GrowingCache:
    """The obvious cache: concatenate."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = torch.cat((self.layers[layer][0], k), 2), torch.cat((self.layers[layer][1], v), 2)
        self.layers[layer] = (k, v)
        return k, v


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG).eval()


def test_a_cache_changes_nothing(model: Llama) -> None:
    x = torch.randn(1, 9, 32)
    whole = model(x)
    cache = GrowingCache()
    steps = [model(x[:, :4], cache=cache)]
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 6 + [False], [True] * 7])[None, None]
    steps.append(model(x[:, 4:7], positions=torch.arange(4, 7)[None], mask=mask, cache=cache))
    steps += [model(x[:, t : t + 1], positions=torch.tensor([[t]]), cache=cache) for t in (7, 8)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)


def test_packed_documents_equal_documents_alone_in_loss_and_gradient(model: Llama) -> None:
    ids = torch.randint(0, 50, (11,))
    lengths = (4, 7)

    def grads(losses: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = [model(model.embed_tokens(part)[None]).square().sum() for part in ids.split(lengths)]
    documents = torch.tensor([[0] * 4 + [1] * 7])
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = (
        model(model.embed_tokens(ids)[None], positions=positions, mask=packed_mask(documents)).square().sum()
    )
    torch.testing.assert_close(packed, alone[0] + alone[1], rtol=1e-5, atol=1e-4)
    for a, b in zip(grads([packed]), grads(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_cache_holds_keys_and_values_of_the_shared_heads(model: Llama) -> None:
    cache = GrowingCache()
    model(torch.randn(1, 3, 32), cache=cache)
    found = tuple((slot.shape[1], slot.shape[3]) for slot in cache.layers[0])
    assert found == CONFIG.cache_shape == ((2, 8), (2, 8))


def test_packed_mask_is_the_one_in_its_docstring() -> None:
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert packed_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0].int().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_stay_float32_after_a_cast(model: Llama, dtype: torch.dtype) -> None:
    positions = torch.tensor([[255, 256, 257, 4095]])
    cos, sin = rotary_table(positions, width=8, theta=10000.0)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions.double()[..., None] / 10000.0 ** (torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(cos[0, 0, :, :4].double(), exact.cos()[0], rtol=0, atol=5e-4)
    model = model.to(dtype)
    x = torch.randn(1, 1, 32).to(dtype).repeat(1, 4, 1)
    out = model(x, positions=positions)
    assert out.dtype == dtype
    assert not any("rotary" in name or "inv_freq" in name for name, _ in model.named_buffers())


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> Tensor:
        table = [rotary_table(torch.tensor([[p]]), width=8, theta=10000.0) for p in (i, j)]
        return (rotate(q, *table[0]) * rotate(k, *table[1])).sum()

    torch.testing.assert_close(score(3, 1), score(903, 901), rtol=0, atol=1e-3)
    assert (score(3, 1) - score(3, 2)).abs() > 1e-3


def test_rms_norm_is_computed_in_float32() -> None:
    norm = RmsNorm(64, eps=1e-6).half()
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # its square overflows float16
    torch.testing.assert_close(norm(x), torch.ones(1, 64, dtype=torch.float16))


def test_a_batch_equals_single_rows(model: Llama) -> None:
    x = torch.randn(3, 6, 32)
    for n in range(3):
        torch.testing.assert_close(model(x)[n : n + 1], model(x[n : n + 1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "not divisible"),
        ({"kv_heads": 3}, "evenly"),
        ({"width": 36, "heads": 12, "kv_heads": 12}, "even width"),
    ],
)
def test_impossible_dimensions_are_refused(change: dict[str, object], message: str) -> None:
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | change
    with pytest.raises(SeekVLError, match=message):
        LlamaConfig(**fields)  # type: ignore[arg-type]
