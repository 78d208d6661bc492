"""Cog's view of seekvl: a picture and a prompt in, a text out, with the inputs of the published port."""

import os

from cog import BasePredictor, Input, Path

import seekvl


class Predictor(BasePredictor):
    """Answers one request after the other; the model is the one that SEEKVL_MODEL names."""

    def setup(self) -> None:
        """Load the model."""
        self.vlm = seekvl.load(os.environ.get("SEEKVL_MODEL", "seekvl-nano"))

    def predict(
        self,
        image: Path = Input(description="Picture"),  # noqa: B008 - Cog reads the inputs there
        prompt: str = Input(description="Question or task; <image> marks where the picture stands"),
        temperature: float = Input(description="0 takes the likeliest token", default=0.1, ge=0, le=1),
        top_p: float = Input(description="Draw among tokens of this probability", default=0.9, ge=0, le=1),
        repetition_penalty: float = Input(description="0 or 1: none", default=1.1, ge=0, le=2),
        max_length_tokens: int = Input(description="Most new tokens", default=2048, ge=0, le=4096),
    ) -> str:
        """Answer."""
        if max_length_tokens == 0:
            return ""
        answer = self.vlm.chat(
            [{"role": "user", "content": prompt, "images": [str(image)]}],
            temperature=temperature,
            top_p=top_p or 1e-9,
            repetition_penalty=repetition_penalty or 1.0,
            max_new_tokens=max_length_tokens,
        )
        return answer.text.strip()
