"""seekvl: DeepSeek-VL, from the drawing of its training data to the answer about a picture."""

__version__ = "0.1.0"
