"""DeepSeek-VL: vision towers, adaptor and language model as one network (2403.05525, sec. 3.1).

Letters: b rows, t tokens, n pictures, s slots a picture, S side of a picture in px, d language width, v
vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from seekvl.models.adaptor import Adaptor, AdaptorConfig
from seekvl.models.hybrid import Hybrid, HybridConfig
from seekvl.models.llama import LayerCache, Llama, LlamaConfig
from seekvl.models.siglip import Siglip, SiglipConfig
from seekvl.runtime import SeekVLError


def check_adaptor(adaptor: AdaptorConfig, *, vision: SiglipConfig | HybridConfig, width: int) -> None:
    """Raise SeekVLError for an adaptor that does not lead from these towers to this language width d."""
    if adaptor.is_hybrid != isinstance(vision, HybridConfig):
        raise SeekVLError(f"adaptor {adaptor.kind!r} does not fit {type(vision).__name__}")
    tower = vision.low if isinstance(vision, HybridConfig) else vision
    if tower.width != adaptor.input_width:
        raise SeekVLError(f"vision hands on width {tower.width}, the adaptor takes {adaptor.input_width}")
    if adaptor.width != width:
        raise SeekVLError(f"the adaptor makes width {adaptor.width}, the language model has {width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class VLConfig:
    """The three parts, which must fit each other."""

    vision: SiglipConfig | HybridConfig
    adaptor: AdaptorConfig
    language: LlamaConfig

    def __post_init__(self) -> None:
        check_adaptor(self.adaptor, vision=self.vision, width=self.language.width)

    @property
    def image_size(self) -> int:
        """Side of the square picture the network is fed, px."""
        return (
            self.vision.high.image_size if isinstance(self.vision, HybridConfig) else self.vision.image_size
        )

    @property
    def visual_tokens(self) -> int:
        """Feature rows the towers make of one picture."""
        tower = self.vision.low if isinstance(self.vision, HybridConfig) else self.vision
        return tower.grid**2


def splice(embeds: Tensor, *, image_mask: Tensor | None, image_features: Tensor | None) -> Tensor:
    """Return f[b, t, d] with picture rows f[..., d] in the slots bool[b, t], in order.

    Raises SeekVLError when slots and rows differ in number.
    """
    features = None if image_features is None else image_features.flatten(0, -2)  # rows d
    slots = 0 if image_mask is None else int(image_mask.sum())
    rows = 0 if features is None else len(features)
    if slots != rows:
        raise SeekVLError(
            f"{slots} picture slots in the tokens, but {rows} feature rows from the vision towers"
        )
    if image_mask is None or features is None or slots == 0:
        return embeds
    index = image_mask.flatten().nonzero().squeeze(1)
    return embeds.flatten(0, 1).index_copy(0, index, features.to(embeds.dtype)).view_as(embeds)


class VL(nn.Module):
    """The whole network, single device."""

    def __init__(self, config: VLConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = (
            Hybrid(config.vision) if isinstance(config.vision, HybridConfig) else Siglip(config.vision)
        )
        self.adaptor = Adaptor(config.adaptor)
        self.language = Llama(config.language)

    def encode_pictures(
        self, pixels: Tensor, *, low_pixels: Tensor | None = None, normalized: bool = False
    ) -> Tensor:
        """Turn pictures f[n, 3, S, S] into rows f[n, s, d] that stand where words stand.

        `low_pixels` and `normalized` come from the processor, see `Hybrid.forward`.
        """
        if isinstance(self.vision, Hybrid):
            features = self.vision(pixels, low_pixels=low_pixels, normalized=normalized)
        else:
            if low_pixels is not None:
                raise SeekVLError("low_pixels were given, but this model has a single tower")
            features = self.vision(pixels, normalized=normalized)
        out: Tensor = self.adaptor(features)
        return out

    def embed(
        self, input_ids: Tensor, *, image_mask: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """Return embeddings f[b, t, d] of i64[b, t] with picture rows in their slots, see `splice`."""
        embeds: Tensor = self.language.embed_tokens(input_ids)
        return splice(embeds, image_mask=image_mask, image_features=image_features)

    def hidden(
        self,
        embeds: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Return hidden states f[b, t, d] after the final norm; arguments as in `Llama.forward`."""
        out: Tensor = self.language(embeds, positions=positions, mask=mask, cache=cache)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits f[..., v] of hidden states f[..., d]."""
        out: Tensor = self.language.lm_head(hidden)
        return out

    def forward(
        self,
        input_ids: Tensor,
        *,
        image_mask: Tensor | None = None,
        pixels: Tensor | None = None,
        low_pixels: Tensor | None = None,
        normalized: bool = False,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits f[b, t, v] of every position; without pixels the vision towers do not run."""
        features = None
        if pixels is not None:
            features = self.encode_pictures(pixels, low_pixels=low_pixels, normalized=normalized)
        embeds = self.embed(input_ids, image_mask=image_mask, image_features=features)
        return self.head(self.hidden(embeds, positions=positions, mask=mask))
