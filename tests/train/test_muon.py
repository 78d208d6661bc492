import pytest
import torch
from torch import Tensor

from seekvl.train.muon import StackedMuon, orthogonal
from seekvl.train.optimizer import MUON_MOMENTUM


@pytest.mark.parametrize("shape", [(5, 16, 24), (5, 24, 16), (1, 16, 16)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_stack_learns_as_its_matrices_do_alone(shape: tuple[int, int, int], decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    stack = start.clone().requires_grad_()
    alone = [matrix.clone().requires_grad_() for matrix in start]
    group = {"lr": 0.02, "momentum": MUON_MOMENTUM}
    ours = StackedMuon([{"params": [stack], "weight_decay": decay}], **group)
    theirs = torch.optim.Muon(alone, weight_decay=decay, adjust_lr_fn="match_rms_adamw", **group)
    for _ in range(4):
        stack.grad = torch.randn(shape)
        for matrix, grad in zip(alone, stack.grad, strict=True):
            matrix.grad = grad.clone()
        ours.step()
        theirs.step()
    moved = (stack - start).abs().max().item()
    assert moved > 0.02  # lr times four steps, about
    torch.testing.assert_close(stack.detach(), torch.stack(alone).detach(), rtol=0, atol=0.03 * moved)


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 32, 48) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    values = torch.linalg.svdvals(orthogonal(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.35


def test_an_expert_that_nobody_asked_does_not_move() -> None:
    """Its gradient is zero; to divide by its norm would make it noise."""
    stack = torch.ones(2, 4, 6, requires_grad=True)
    stack.grad = torch.stack((torch.randn(4, 6), torch.zeros(4, 6)))
    StackedMuon([{"params": [stack]}], lr=0.1, momentum=0.95).step()
    assert torch.equal(stack[1].detach(), torch.ones(4, 6))
    assert not torch.equal(stack[0].detach(), torch.ones(4, 6))


def test_the_momentum_goes_on_through_its_state() -> None:
    grads = torch.randn(4, 2, 4, 6, generator=torch.Generator().manual_seed(0))

    def make(start: Tensor) -> tuple[Tensor, StackedMuon]:
        stack = start.clone().requires_grad_()
        return stack, StackedMuon([{"params": [stack]}], lr=0.1, momentum=0.95)

    def learn(stack: Tensor, optimizer: StackedMuon, grads: Tensor) -> None:
        for grad in grads:
            stack.grad = grad
            optimizer.step()

    whole, optimizer = make(torch.zeros(2, 4, 6))
    learn(whole, optimizer, grads)
    broken, first = make(torch.zeros(2, 4, 6))
    learn(broken, first, grads[:2])
    again, second = make(broken.detach())
    second.load_state_dict(first.state_dict())
    learn(again, second, grads[2:])
    assert torch.equal(again, whole)
