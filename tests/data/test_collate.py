import pytest
import torch

from seekvl.data.collate import Part, bucket, collate
from seekvl.processing.encode import ModelInput, TokenBill
from seekvl.runtime import SeekVLError


def sample(ids: list[int], **fields: object) -> ModelInput:
    """Make an encoded sample whose last token is learnt."""
    weights = torch.zeros(len(ids))
    weights[-1] = 1.0
    given = {
        "input_ids": torch.tensor(ids),
        "image_mask": torch.zeros(len(ids), dtype=torch.bool),
        "pixels": None,
        "low_pixels": None,
        "normalized": False,
        "loss_weights": weights,
        "picture_sizes": (),
        "prompt": "",
        "bill": TokenBill(text_tokens=len(ids), image_tokens=(), total=len(ids), limit=99),
    }
    return ModelInput(**{**given, **fields})


def test_rows_are_padded_on_the_right_to_the_smallest_length() -> None:
    batch = collate([sample([5, 6, 7]), sample([8])], lengths=(8, 4), pad_id=2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert batch.loss_weights.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.present.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert not batch.image_mask.any()
    assert batch.pixels is None
    assert len(batch) == 2


def test_pictures_follow_the_order_of_rows() -> None:
    one, two = torch.full((1, 3, 2, 2), 0.1), torch.full((2, 3, 2, 2), 0.2)
    mask = torch.tensor([True, False])
    batch = collate(
        [sample([1, 2], pixels=one, image_mask=mask), sample([3]), sample([4], pixels=two)],
        lengths=(2,),
        pad_id=0,
    )
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.2, 0.2])
    assert batch.image_mask.tolist() == [[True, False], [False, False], [False, False]]


def test_tiles_are_concatenated_without_padding() -> None:
    one, seven = torch.full((1, 3, 2, 2), 0.1), torch.full((7, 3, 2, 2), 0.2)
    tiled = [
        sample([1], pixels=one, grids=((1, 1),)),
        sample([2], grids=()),
        sample([3], pixels=torch.cat([seven, one]), grids=((2, 3), (1, 1))),
    ]
    batch = collate(tiled, lengths=(2,), pad_id=0)
    assert batch.grids == ((1, 1), (2, 3), (1, 1))
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == pytest.approx([0.1, *[0.2] * 7, 0.1])
    assert batch.to(torch.device("meta")).grids == batch.grids
    assert collate([sample([1])], lengths=(2,), pad_id=0).grids is None


def test_parts_hold_rows_of_alike_length_with_their_pictures() -> None:
    bright, dark = torch.full((1, 3, 2, 2), 0.9), torch.full((1, 3, 2, 2), 0.1)
    mask = torch.tensor([True, False, False, False, False])
    inputs = [
        sample([1] * 5, pixels=bright, image_mask=mask),
        sample([2]),
        sample([3] * 3),
        sample([4, 4], pixels=dark, image_mask=mask[:2]),
        sample([5] * 3),
    ]
    batch = collate(inputs, lengths=(2, 4, 8), pad_id=0, parts=2)
    assert batch.parts == (Part(rows=2, tokens=2), Part(rows=3, tokens=8))
    assert batch.input_ids[:, 0].tolist() == [2, 4, 3, 5, 1]
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.9])
    assert batch.image_mask.nonzero().tolist() == [[1, 0], [4, 0]]
    whole = collate(inputs, lengths=(2, 4, 8), pad_id=0)
    assert whole.parts == (Part(rows=5, tokens=8),)
    assert whole.input_ids[:, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("parts", [0, 3])
def test_a_batch_cannot_be_cut_into_more_parts_than_it_has_samples(parts: int) -> None:
    with pytest.raises(SeekVLError, match=f"a batch of 2 samples cannot be cut into {parts} parts"):
        collate([sample([1]), sample([2])], lengths=(4,), pad_id=0, parts=parts)


def test_moving_keeps_every_field() -> None:
    pixels = torch.rand(1, 3, 2, 2)
    batch = collate([sample([1], pixels=pixels, low_pixels=pixels, normalized=True)], lengths=(4,), pad_id=0)
    moved = batch.to(torch.device("meta"))
    assert moved.normalized
    assert {moved.input_ids.device.type, moved.present.device.type, moved.pixels.device.type} == {"meta"}
    assert moved.positions.shape == (1, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "at least one sample"),
        ([sample([1]), sample([1] * 9)], "sample 1 of the batch: 9 tokens exceed the longest row of 8"),
        (
            [sample([1], loss_weights=None)],
            "sample 0 of the batch has no loss weights; encode it with train=True",
        ),
        (
            [sample([1], pixels=torch.zeros(1, 3, 4, 4)), sample([1], pixels=torch.zeros(1, 3, 2, 2))],
            r"sample 1 of the batch: pixels are \(3, 2, 2\), others \(3, 4, 4\)",
        ),
        (
            [
                sample([1], pixels=torch.zeros(1, 3, 4, 4)),
                sample([1], pixels=torch.zeros(1, 3, 4, 4), low_pixels=torch.zeros(1, 3, 2, 2)),
            ],
            "1 of 2 samples with pictures have low_pixels",
        ),
        (
            [
                sample([1], pixels=torch.zeros(1, 3, 4, 4)),
                sample([1], pixels=torch.zeros(1, 3, 4, 4), normalized=True),
            ],
            "some pictures of the batch are normalised and some are not",
        ),
        (
            [
                sample([1], pixels=torch.zeros(1, 3, 4, 4)),
                sample([1], pixels=torch.zeros(1, 3, 4, 4), grids=((1, 1),)),
            ],
            "1 of 2 samples with pictures have grids",
        ),
        (
            [sample([1]), sample([1], pixels=torch.zeros(4, 3, 4, 4), grids=((2, 2),))],
            "sample 1 of the batch: its grids make 5 tiles, and it has 4",
        ),
    ],
)
def test_samples_that_do_not_fit_are_refused(inputs: list[ModelInput], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        collate(inputs, lengths=(4, 8), pad_id=0)


def test_bucket_names_the_limit() -> None:
    assert bucket(4, lengths=(8, 4)) == 4
    with pytest.raises(SeekVLError, match="9 tokens exceed the longest row of 8"):
        bucket(9, lengths=(8, 4))
