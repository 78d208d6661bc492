import pytest
import torch

from seekvl.engine.cache import BLOCK, KVCache, token_bytes
from seekvl.models.deepseek_v2 import DeepseekV2Config
from seekvl.models.llama import LlamaConfig
from seekvl.models.mla import MlaConfig
from seekvl.runtime import SeekVLError

CONFIG = LlamaConfig(
    vocab_size=8, width=8, layers=2, heads=2, kv_heads=1, mlp_width=8, max_positions=3 * BLOCK
)


def cache(rows: int = 1) -> KVCache:
    return KVCache(CONFIG, rows=rows, device=torch.device("cpu"), dtype=torch.float32)


def tokens(rows: int, count: int, *, value: float = 0.0) -> torch.Tensor:
    return torch.arange(rows * count * 4.0).view(rows, 1, count, 4) + value


def fill(target: KVCache, row: int, count: int, *, value: float = 0.0) -> torch.Tensor:
    target.reserve(target.lengths[row] + count)
    view, k = target.row(row), tokens(1, count, value=value)
    for layer in range(CONFIG.layers):
        view.update(layer, k, -k)
    view.advance(count)
    return k


def test_a_row_returns_everything_it_holds() -> None:
    held = cache()
    first = fill(held, 0, 3)
    held.reserve(5)
    second = tokens(1, 2, value=100)
    k, v = held.row(0).update(1, second, -second)
    assert torch.equal(k, torch.cat((first, second), dim=2))
    assert torch.equal(v, -k)


def test_rows_are_appended_at_their_own_length() -> None:
    held = cache(rows=3)
    for row, count in enumerate((4, 1, 4)):
        fill(held, row, count, value=10.0 * row)
    held.reserve(5)
    new = torch.full((3, 1, 1, 4), 99.0)
    at = held.at([0, 1, 2])
    k, _ = at.update(0, new, new)
    assert k.shape == (3, 1, 5, 4)
    assert [row[0, :, 0].tolist().index(99.0) for row in k] == [4, 1, 4]
    mask = at.mask()
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[True] * 5, [True, True, False, False, False], [True] * 5]
    assert at.positions().tolist() == [[4], [1], [4]]
    at.advance()
    assert held.lengths == [5, 2, 5]


@pytest.mark.parametrize("slots", [[3], [1, 2], [0, 3], [3, 0, 1]])
def test_slots_in_use_need_not_be_the_first(slots: list[int]) -> None:
    held = cache(rows=4)
    for row, count in enumerate((4, 1, 3, 2)):
        fill(held, row, count, value=10.0 * row)
    before = [held.buffers[0][0][row].clone() for row in range(4)]
    new = torch.arange(len(slots) * 4.0).view(-1, 1, 1, 4) + 500
    at = held.at(slots)
    k, v = at.update(0, new, -new)
    at.advance()
    for row, slot in enumerate(slots):
        end = held.lengths[slot]
        assert torch.equal(k[row, :, : end - 1], before[slot][:, : end - 1])
        assert torch.equal(k[row, :, end - 1], new[row, :, 0])
        assert torch.equal(v[row, :, :end], -k[row, :, :end])
    for slot in set(range(4)) - set(slots):
        assert torch.equal(held.buffers[0][0][slot], before[slot])
    assert held.lengths == [count + (row in slots) for row, count in enumerate((4, 1, 3, 2))]


def test_a_slot_takes_one_token_of_a_step() -> None:
    held = cache(rows=2)
    for slots in ([], [1, 1]):
        with pytest.raises(SeekVLError, match="one token for each of some slots"):
            held.at(slots)


def test_equal_rows_need_no_mask() -> None:
    held = cache(rows=2)
    fill(held, 0, 2)
    fill(held, 1, 2)
    assert held.at([0, 1]).mask() is None


def test_growing_keeps_what_is_held() -> None:
    held = cache()
    first = fill(held, 0, BLOCK)
    assert held.capacity == BLOCK
    held.reserve(BLOCK + 1)
    assert held.capacity == 2 * BLOCK
    new = tokens(1, 1)
    k, _ = held.at([0]).update(0, new, new)
    assert torch.equal(k[:, :, :BLOCK], first)
    assert held.nbytes == 2 * CONFIG.layers * 2 * BLOCK * 4 * 4


def test_columns_nobody_wrote_are_finite() -> None:
    # a mask gives them weight 0, and 0 times NaN would be NaN: a ragged batch once died of it
    held = cache(rows=2)
    fill(held, 0, 9)
    held.reserve(BLOCK + 1)
    new = tokens(2, 1)
    k, v = held.at([0, 1]).update(0, new, new)
    assert k[1, :, 1:].abs().sum() == v[1, :, 1:].abs().sum() == 0


def test_capacity_ends_at_the_longest_sequence() -> None:
    held = cache()
    held.reserve(3 * BLOCK)
    with pytest.raises(SeekVLError, match=r"769 tokens exceed the model's longest sequence of 768"):
        held.reserve(3 * BLOCK + 1)


def test_writing_past_the_buffers_is_an_error() -> None:
    held = cache()
    with pytest.raises(SeekVLError, match="room for 0 tokens a row, 1 are needed"):
        held.at([0]).update(0, tokens(1, 1), tokens(1, 1))
    with pytest.raises(SeekVLError, match="room for 0 tokens a row, 3 are needed"):
        held.row(0).update(0, tokens(1, 3), tokens(1, 3))


def test_many_tokens_need_a_row() -> None:
    with pytest.raises(SeekVLError, match="use row"):
        cache().at([0]).update(0, tokens(1, 2), tokens(1, 2))


def test_truncate_forgets_the_end_and_only_the_end() -> None:
    held = cache()
    first = fill(held, 0, 4)
    held.truncate(0, 2)
    new = tokens(1, 1, value=50)
    k, _ = held.row(0).update(0, new, new)
    assert torch.equal(k, torch.cat((first[:, :, :2], new), dim=2))
    for length in (-1, 3):
        with pytest.raises(SeekVLError, match=f"cannot be cut to {length}"):
            held.truncate(0, length)


def test_copy_gives_another_slot_the_same_beginning() -> None:
    held = cache(rows=3)
    fill(held, 0, 4)
    source = fill(held, 2, 3, value=70)
    held.copy(2, 0, length=2)
    assert held.lengths == [2, 0, 3]
    k, _ = held.row(0).update(1, tokens(1, 1), tokens(1, 1))
    assert torch.equal(k[:, :, :2], source[:, :, :2])
    held.copy(2, 2, length=1)
    assert held.lengths == [2, 0, 1]
    with pytest.raises(SeekVLError, match="row 2 holds 1 tokens, 2 cannot be copied"):
        held.copy(2, 1, length=2)


def test_resizing_keeps_what_fits_and_gives_memory_back() -> None:
    held = cache(rows=2)
    first = fill(held, 0, BLOCK + 5)
    fill(held, 1, 3)
    held.resize(rows=4, capacity=2 * BLOCK)
    assert held.lengths == [BLOCK + 5, 3, 0, 0]
    full = held.nbytes
    held.resize(rows=1, capacity=BLOCK)
    assert (held.lengths, held.rows, held.nbytes) == ([BLOCK], 1, full // 8)
    assert torch.equal(held.buffers[0][1][:, :, :BLOCK], first[:, :, :BLOCK])
    for rows, capacity in ((0, BLOCK), (1, 4 * BLOCK), (1, -1)):
        with pytest.raises(SeekVLError, match="cannot be"):
            held.resize(rows=rows, capacity=capacity)


def test_wiping_leaves_nothing_that_is_not_finite() -> None:
    held = cache(rows=2)
    fill(held, 1, 3, value=float("nan"))
    held.wipe(1)
    assert held.lengths == [0, 0]
    assert all(buffer.isfinite().all() for side in held.buffers for buffer in side)


def test_bytes_of_a_token_are_those_of_the_buffers() -> None:
    for config in (CONFIG, LATENT):
        held = KVCache(config, rows=3, device=torch.device("cpu"), dtype=torch.float32)
        held.reserve(1)
        assert held.nbytes == 3 * held.capacity * token_bytes(config, itemsize=4)


def test_a_cache_without_rows_is_refused() -> None:
    with pytest.raises(SeekVLError, match="at least 1 row"):
        cache(rows=0)


LATENT = DeepseekV2Config(
    vocab_size=8,
    width=8,
    layers=2,
    heads=2,
    kv_heads=2,
    mlp_width=8,
    max_positions=3 * BLOCK,
    mla=MlaConfig(kv_rank=5, nope_width=3, rope_width=2, value_width=3),
    moe=None,
    dense_first=0,
)


def test_a_latent_and_its_rotary_key_stand_in_the_two_places() -> None:
    held = KVCache(LATENT, rows=2, device=torch.device("cpu"), dtype=torch.float32)
    held.reserve(4)
    view = held.row(1)
    rotary, latent = torch.rand(1, 1, 3, 2), torch.rand(1, 1, 3, 5)
    k, v = view.update(0, rotary, latent)
    assert torch.equal(k, rotary)
    assert torch.equal(v, latent)
    view.advance(3)
    k, v = held.at([0, 1]).update(0, torch.ones(2, 1, 1, 2), torch.ones(2, 1, 1, 5))
    assert (k.shape, v.shape) == ((2, 1, 4, 2), (2, 1, 4, 5))
    assert torch.equal(v[1, :, :3], latent[0])
    assert held.nbytes == 2 * LATENT.layers * (2 + 5) * BLOCK * 4
    held.copy(1, 0, length=3)
    assert torch.equal(held.buffers[1][0][0, :, :3], latent[0])
