"""V-JEPA 2 as functions: latents stay on the device, to be used as often as one likes.

with Engine("vjepa2") as engine:
    clip = engine.encode("clip.mp4")
    hidden = engine.predict(clip, context_mask=[...], target_mask=[...]).numpy()
"""

from __future__ import annotations

from typing import Any

from mstar.errors import InvalidRequest
from mstar.models.vjepa2.latents import Latents, latents_of
from mstar.models.vjepa2.requests import Seen

__all__ = ["World"]


class World:
    """`Engine.encode` and `Engine.predict`. What does not fit raises InvalidRequest."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.model  # a `VJepa2`

    def encode(
        self, frames: Any, *, num_frames: int | None = None, fps: float | None = None
    ) -> Latents:
        """The encoder's tokens `[tokens, hidden]` of a video, a list of images or an image; what
        has less frames than a tubelet stands still. See the parameters of `generate`."""
        given = {"num_frames": num_frames, "fps": fps}
        params = self.engine.card.parameters.validate(given)
        seen = Seen(self.model.frames("frames", frames, params["num_frames"], params["fps"]))
        return Latents(self.engine.run(lambda _: self.model.encode(seen)))

    def predict(self, latents: Any, context_mask: Any = None, target_mask: Any = None) -> Latents:
        """What the predictor makes of a clip's tokens, `[targets, hidden]`.

        Args:
            latents: of `encode`, or an array `[tokens, hidden]`, of a whole clip.
            context_mask, target_mask: numbers of the tokens that are seen, and of those that are
                predicted; all of the clip's if left out.
        """
        model, width = self.model, self.model.config.hidden_size
        tokens = latents_of("latents", latents)
        if tokens.ndim == 3 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 2 or tokens.shape[1] != width or len(tokens) % model.grid**2:
            allowed = f"must be [tokens, {width}], {model.grid**2} tokens for each time of a clip"
            raise InvalidRequest("latents", f"array {tuple(tokens.shape)}", allowed)
        given = {"context_mask": context_mask, "target_mask": target_mask}
        masks = model.masks(self.engine.card.parameters.validate(given), len(tokens))
        tokens = tokens.to(model.device, model.net.encoder.norm.weight.dtype)
        return Latents(self.engine.run(lambda _: model.predict(model.asked(tokens, masks))))
