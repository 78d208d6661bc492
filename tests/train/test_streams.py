import pytest
import torch

from seekvl.processing.encode import ModelInput, TokenBill
from seekvl.runtime import SeekVLError
from seekvl.train.schedule import LanguageShare
from seekvl.train.streams import Streams


def source(first: int):
    """Return a stream whose sample i holds the token first + i."""

    def sample(index: int) -> ModelInput:
        return ModelInput(
            input_ids=torch.tensor([first + index, 1]),
            image_mask=torch.zeros(2, dtype=torch.bool),
            pixels=None,
            low_pixels=None,
            normalized=False,
            loss_weights=torch.tensor([0.0, 1.0]),
            picture_sizes=(),
            prompt="",
            bill=TokenBill(text_tokens=2, image_tokens=(), total=2, limit=9),
        )

    return sample


def streams(**fields: object) -> Streams:
    given = {
        "batch_size": 2,
        "lengths": (4,),
        "pad_id": 0,
        "language": source(100),
        "multimodal": source(500),
    }
    return Streams(**{**given, **fields})


def test_every_sample_of_both_streams_comes_once_and_in_order() -> None:
    both = streams(share=LanguageShare(target=0.7))
    seen = [both(step).input_ids[:, 0].tolist() for step in range(10)]
    assert [token for row in seen for token in row if token < 500] == list(range(100, 114))
    assert [token for row in seen for token in row if token >= 500] == list(range(500, 506))
    assert [both.kind(step)[0] for step in range(4)] == ["m", "l", "l", "m"]


def test_one_stream_needs_no_share() -> None:
    assert streams(language=None)(3).input_ids[:, 0].tolist() == [506, 507]
    assert streams(multimodal=None).kind(3) == "language"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": None, "multimodal": None}, "need a language source"),
        ({}, "two need a share"),
        ({"language": None, "share": LanguageShare(target=0.5)}, "one takes none"),
        ({"language": None, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_streams_that_do_not_add_up_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        streams(**fields)


def test_sample_too_long_names_stream_and_samples() -> None:
    with pytest.raises(
        SeekVLError, match="multimodal samples 6 to 7: sample 0 of the batch: 2 tokens exceed"
    ):
        streams(language=None, lengths=(1,))(3)


def test_streams_cut_their_batches_into_parts() -> None:
    assert len(streams(parts=2, multimodal=None)(0).parts) == 2
    with pytest.raises(SeekVLError, match="3 parts of a batch of 2 samples"):
        streams(parts=3, multimodal=None)
