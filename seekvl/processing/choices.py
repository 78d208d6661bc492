"""Words a caller chooses from that the command line must know before anything heavy is imported."""

from typing import Literal

Preprocessing = Literal["seekvl", "official", "transformers"]
"""How pictures become pixels; see `pad_image.prepare_picture` and `tile_image.prepare_tiles`."""
