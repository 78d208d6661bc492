"""Matrices rounded to whole numbers of eight or four bits: by themselves, or with what they meet.

int8 has the largest magnitude of a row as its 127th step. int4 searches: for each row and 32 inputs several
scales are tried, each is fitted to the values it gives by least squares, and the one with the least squared
error stays. The number that is largest may get the value -8, of which there is no positive one; a scale may
therefore be negative.

With inputs at hand an error is fed back, as in GPTQ (2210.17323): columns are rounded one after the other,
and what is lost in one is made up for, as well as the inputs allow, by those that are still to come. With
the inputs X[n, i] the loss of a row is the square of X (w - w'), whose curvature is X^T X.

Letters: o rows of a matrix, i inputs, n tokens, G groups of 32 inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from seekvl.models.quantized import GROUP, RANGE, Kind
from seekvl.runtime import SeekVLError

STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)
"""Steps of a scale that int4 tries for the largest number of a group: above 8 it is cut off."""

DAMPING = 0.01
"""Share of the mean curvature that is added to all of it: what few inputs have shown is trusted less
(2210.17323, sec. 3.3).
"""

BLOCK = GROUP
"""Columns whose errors reach all later ones in one product, a multiple of `GROUP`: within a block each column
goes over the rest of it by itself, which is slower.
"""


def int8_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers i8[o, i] and scales f32[o] of a matrix f[o, i].

    >>> int8_values(torch.tensor([[1.27, -0.5]]))[0].tolist()
    [[127, -50]]
    """
    scales = weight.float().abs().amax(dim=1) / 127.0
    values = (weight.float() / scales.where(scales > 0, 1.0)[:, None]).round()
    return values.clamp(*RANGE["int8"]).to(torch.int8), scales


def int4_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers i8[o, i] and scales f32[o, G], which bfloat16 holds, of a matrix f[o, i].

    >>> values, scales = int4_values(torch.tensor([[-0.5, 0.25] + [0.0] * 30]))
    >>> values[0, :2].tolist(), scales.tolist()
    ([-8, 4], [[0.0625]])
    """
    width = weight.shape[1]
    groups = torch.unflatten(F.pad(weight.float(), (0, -width % GROUP)), 1, (-1, GROUP))  # o G 32
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))  # o G 1
    unit = largest.where(largest != 0, 1.0)
    shares = groups / unit  # squares of the numbers themselves may be too small or too large for float32
    best, least = torch.zeros_like(largest), shares.square().sum(dim=2, keepdim=True)
    for steps in STEPS:
        values = _nearest(groups, largest / -steps, kind="int4")
        squares = values.square().sum(dim=2, keepdim=True).clamp(min=1.0)
        scale = ((values * shares).sum(dim=2, keepdim=True) / squares * unit).bfloat16().float()
        error = (
            (shares - scale / unit * _nearest(groups, scale, kind="int4")).square().sum(dim=2, keepdim=True)
        )
        better = error < least
        best, least = scale.where(better, best), error.where(better, least)
    values = _nearest(groups, best, kind="int4").flatten(1)[:, :width]
    return values.to(torch.int8), best.squeeze(2)


def feedback_factor(inputs: Tensor) -> Tensor:
    """Return U f32[i, i], upper triangular, with U^T U the inverse of the damped curvature of inputs f[n, i].

    Row c holds how the columns behind c make up for an error in c, times U[c, c].

    Raises SeekVLError for inputs that are not finite.
    """
    x = inputs.float()
    if not x.isfinite().all():
        raise SeekVLError("its inputs hold numbers that are NaN or infinite")
    curvature = x.T @ x  # i i
    mean = curvature.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(curvature))
    curvature.div_(mean)
    for damping in (DAMPING, 10 * DAMPING):  # float32 may need more where inputs lie in few directions
        curvature.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            inverse: Tensor = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                found: Tensor = upper
                return found
    raise SeekVLError("its inputs lie in so few directions that float32 cannot take their measure")


def feedback_values(weight: Tensor, kind: Kind, *, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers i8[o, i] and scales as `int8_values` or `int4_values` do, with errors fed back by
    the factor f32[i, i] of the inputs.

    Scales of int8 are those of the matrix as it was; a group of int4 gets its own when it is reached, for
    what its numbers have become by then.
    """
    o, i = weight.shape
    columns = weight.float().T.contiguous()  # i o: a column lies in one piece
    values = torch.empty(i, o, dtype=torch.int8)
    scale = columns.abs().amax(dim=0) / 127.0  # o
    scales = [scale] if kind == "int8" else []
    for start in range(0, i, BLOCK):
        stop = min(start + BLOCK, i)
        errors = torch.empty(stop - start, o)
        for column in range(start, stop):
            if kind == "int4" and column % GROUP == 0:
                scale = int4_values(columns[column : column + GROUP].T)[1].squeeze(1)
                scales.append(scale)
            value = _nearest(columns[column], scale, kind=kind)
            values[column] = value.to(torch.int8)
            error = (columns[column] - value * scale) / factor[column, column]
            columns[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
            errors[column - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    return values.T.contiguous(), torch.stack(scales, dim=1) if kind == "int4" else scale


def _nearest(numbers: Tensor, scale: Tensor, *, kind: Kind) -> Tensor:
    """Return the values of numbers under a scale, in float32; a scale of zero has none but zero."""
    return (numbers / scale.where(scale != 0, torch.inf)).round().clamp(*RANGE[kind])
