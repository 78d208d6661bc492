"""seekvl: DeepSeek-VL, from the drawing of its training data to the answer about a picture."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seekvl.processing import grounding
    from seekvl.processing.conversation import Conversation
    from seekvl.processing.grounding import Box
    from seekvl.runtime import SeekVLError
    from seekvl.vlm import VLM, Answer, load

__version__ = "0.1.0"

__all__ = ["VLM", "Answer", "Box", "Conversation", "SeekVLError", "__version__", "grounding", "load"]

_HOMES = {
    "Answer": "seekvl.vlm",
    "Box": "seekvl.processing.grounding",
    "Conversation": "seekvl.processing.conversation",
    "SeekVLError": "seekvl.runtime",
    "VLM": "seekvl.vlm",
    "grounding": "seekvl.processing.grounding",
    "load": "seekvl.vlm",
}


def __getattr__(name: str) -> object:
    """Find a public name in the room that owns it, on first use, so that `import seekvl` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'seekvl' has no attribute {name!r}")
    import importlib

    home = importlib.import_module(_HOMES[name])
    found: object = home if home.__name__.endswith(f".{name}") else getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
