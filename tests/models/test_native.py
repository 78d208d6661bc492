import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from seekvl.models.native import native_products, products_for


def enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = enabled()
    yield
    assert enabled() == before


def test_the_switch_goes_back_when_the_last_one_leaves() -> None:
    with native_products():
        assert not enabled()
        with native_products():
            assert not enabled()
        assert not enabled()
    assert enabled()


def test_the_switch_goes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), native_products():
        _ = 1 / 0
    assert enabled()


def test_a_user_who_has_switched_onednn_off_keeps_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with native_products():
        assert not enabled()
    assert not enabled()


def test_threads_that_overlap_leave_the_switch_as_it_was() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with native_products():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with native_products():
        thread.start()
        assert entered.wait(60)
    assert not enabled()  # the other is still inside
    leave.set()
    thread.join(60)
    assert enabled()


def test_frozen_flags_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)
    with native_products():
        assert enabled()


@torch.no_grad()
def test_products_are_the_same_but_for_rounding() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    with native_products():
        found = torch.nn.functional.linear(x, weight)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-5)


def test_only_a_single_bfloat16_row_without_gradients_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.zeros(1, 1, 8, dtype=torch.bfloat16)

    def switches(x: torch.Tensor) -> bool:
        return not isinstance(products_for(x), nullcontext)

    assert not switches(row)
    with torch.no_grad():
        assert switches(row)
        assert switches(row[0, 0])
        assert not switches(row.float())
        assert not switches(row.expand(2, 1, 8))
        assert not switches(row[:0])
        assert not switches(row.to("meta"))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not switches(row)
