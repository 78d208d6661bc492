"""Words a caller chooses from that the command line must know before anything heavy is imported."""

from typing import Literal

Constrain = Literal["boxes", "box_first"]
"""What `SamplingParams.constrain` may be."""
