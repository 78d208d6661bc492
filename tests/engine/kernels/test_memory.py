import gc
import threading

import pytest
import torch

from seekvl.engine.kernels import memory
from seekvl.engine.kernels.memory import Pieces

SIDE = 1 << 10


@pytest.fixture
def pieces() -> Pieces:
    return Pieces()


def test_a_dropped_tensor_leaves_its_memory_to_the_next(pieces: Pieces) -> None:
    first = pieces.empty((SIDE, SIDE), dtype=torch.float32).fill_(7.0)
    address = first.data_ptr()
    assert pieces.waiting() == 0
    del first
    assert pieces.waiting() == 4 * SIDE * SIDE
    second = pieces.empty((SIDE // 2, SIDE, 4), dtype=torch.bfloat16)
    assert (second.data_ptr(), second.shape, second.dtype) == (
        address,
        (SIDE // 2, SIDE, 4),
        torch.bfloat16,
    )
    assert second.is_contiguous()
    assert pieces.waiting() == 0


def test_memory_is_kept_as_long_as_anybody_looks_at_it(pieces: Pieces) -> None:
    """A view, a detached tensor and an array of numpy are all enough."""
    views = [
        lambda tensor: tensor[3:5],
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.view(torch.int32),
    ]
    for look in views:
        view = look(pieces.empty((SIDE, SIDE), dtype=torch.float32).fill_(7.0))
        gc.collect()
        assert pieces.waiting() == 0
        pieces.empty((SIDE, SIDE), dtype=torch.float32).fill_(9.0)
        assert (torch.as_tensor(view).view(torch.float32) == 7.0).all()
        del view
        pieces.release()


def test_two_at_a_time_are_two_pieces_and_sizes_are_not_mixed(pieces: Pieces) -> None:
    both = [pieces.empty((SIDE, SIDE), dtype=torch.float32) for _ in range(2)]
    assert both[0].data_ptr() != both[1].data_ptr()
    other = pieces.empty((SIDE, SIDE + 1), dtype=torch.float32)
    del both
    assert pieces.waiting() == 8 * SIDE * SIDE
    del other
    assert pieces.waiting() == 8 * SIDE * SIDE + 4 * SIDE * (SIDE + 1)


def test_released_memory_is_gone_and_used_memory_stays(pieces: Pieces) -> None:
    kept = pieces.empty((SIDE, SIDE), dtype=torch.float32).fill_(7.0)
    pieces.empty((SIDE, SIDE), dtype=torch.float32)
    pieces.release()
    assert pieces.waiting() == 0
    assert (kept == 7.0).all()
    del kept
    assert pieces.waiting() == 4 * SIDE * SIDE


def test_small_tensors_are_left_to_torch(pieces: Pieces) -> None:
    count = memory.SMALLEST // 4
    pieces.empty((count - 1,), dtype=torch.float32)
    assert pieces.waiting() == 0
    pieces.empty((count,), dtype=torch.float32)
    assert pieces.waiting() == memory.SMALLEST
    assert pieces.empty((0, 5), dtype=torch.float32).shape == (0, 5)


def test_no_memory_says_how_much_was_asked_for(pieces: Pieces) -> None:
    with pytest.raises(MemoryError, match="no memory for a gradient of 4,398,046,511,104 MiB"):
        pieces.empty((1 << 60,), dtype=torch.float32)


def test_threads_never_share_a_piece(pieces: Pieces) -> None:
    broken: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            mine = pieces.empty((SIDE, SIDE), dtype=torch.float32)
            mine[:, 0] = number
            if not (mine[:, 0] == number).all():
                broken.append(number)
            del mine

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken
    assert 1 <= pieces.waiting() // (4 * SIDE * SIDE) <= 4
