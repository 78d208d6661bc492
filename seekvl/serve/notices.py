"""What a caller should know of how a request was served: pictures seen smaller than they are, limits met."""

from seekvl.engine.request import Completion
from seekvl.processing import pad_image, tile_image
from seekvl.processing.encode import ModelInput, Processor
from seekvl.processing.pad_image import PadImageConfig
from seekvl.processing.tile_image import WHOLE, Grid, plan_grid


def seen(inputs: ModelInput, processor: Processor) -> list[dict[str, object]]:
    """Return what the model saw of each picture: its size, the size it was scaled to, tiles, tokens.

    `tile` is the side of a tile in px, `tile_tokens` what each tile and the view of the whole cost, without
    the tokens between them.
    """
    image = processor.image
    side = image.patch_slots_side if isinstance(image, PadImageConfig) else image.view_side
    return [
        {
            "size": list(size),
            "scaled": list(_scaled(size, grid, processor)),
            "columns": grid[0],
            "rows": grid[1],
            "tokens": tokens,
            "tile": image.image_size,
            "tile_tokens": side**2,
        }
        for (size, grid), tokens in zip(_views(inputs), inputs.bill.image_tokens, strict=True)
    ]


def notices(inputs: ModelInput, processor: Processor) -> list[str]:
    """Return a sentence for each picture that was shrunk or given fewer tiles than it might have had."""
    lines = []
    for number, (size, grid) in enumerate(_views(inputs), 1):
        scaled = _scaled(size, grid, processor)
        if scaled[0] < size[0] or scaled[1] < size[1]:
            lines.append(
                f"picture {number} of {size[0]}x{size[1]} px was scaled down to {scaled[0]}x{scaled[1]} px"
            )
    if isinstance(processor.image, PadImageConfig):
        return lines
    for number, (size, grid) in enumerate(_views(inputs), 1):
        free = plan_grid(size, processor.image)
        if grid[0] * grid[1] < free[0] * free[1]:
            lines.append(
                f"picture {number} was cut into {grid[0]}x{grid[1]} tiles; alone and without a bound it "
                f"would have had {free[0]}x{free[1]}"
            )
    return lines


def limits_met(completion: Completion, *, asked: int | None) -> list[str]:
    """Return a sentence where an answer ended at a limit that the caller did not set."""
    if completion.finish_reason == "cancelled":
        return ["the answer was cut: its time was over"]
    if completion.finish_reason == "length" and (asked is None or len(completion.token_ids) < asked):
        return ["the answer was cut: the context of the model is full"]
    return []


def _views(inputs: ModelInput) -> list[tuple[tuple[int, int], Grid]]:
    """Return width and height in px of each picture, and its grid of tiles."""
    grids = inputs.grids or (WHOLE,) * len(inputs.picture_sizes)
    return list(zip(inputs.picture_sizes, grids, strict=True))


def _scaled(size: tuple[int, int], grid: Grid, processor: Processor) -> tuple[int, int]:
    """Return width and height in px at which the model sees a picture best."""
    image = processor.image
    if isinstance(image, PadImageConfig):
        left, top, right, bottom = pad_image.content_box(*size, image, mode=processor.preprocessing)
    else:
        canvas = grid[0] * image.image_size, grid[1] * image.image_size
        left, top, right, bottom = tile_image.placed_box(size, canvas)
    return right - left, bottom - top
