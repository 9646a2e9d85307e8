"""V-JEPA 2 as functions: latents stay on the device, to be used as often as one likes.

with Engine("vjepa2") as engine:
    clip = engine.encode("clip.mp4")
    hidden = engine.predict(clip, context_mask=[...], target_mask=[...]).numpy()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mstar.errors import InvalidRequest
from mstar.models.vjepa2.latents import Latents, latents_of
from mstar.models.vjepa2.requests import Seen

__all__ = ["World"]


class World:
    """`Engine.encode` and `Engine.predict`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model = engine.model  # a `VJepa2`

    def encode(
        self, frames: Any, *, num_frames: int | None = None, fps: float | None = None
    ) -> Latents:
        """The encoder's tokens of a clip, `[tokens, hidden]`.

        Args:
            frames: a video, a list of images or an image, as for `generate`; what has less frames
                than a tubelet stands still.
            num_frames, fps: frames that are taken; see the parameters of `generate`.

        Raises:
            InvalidRequest: it is no clip, or a broken one.
        """
        given = {"num_frames": num_frames, "fps": fps}
        params = self.engine.card.parameters.validate(given)
        seen = Seen(self.model.frames("frames", frames, params["num_frames"], params["fps"]))

        async def walk(_: Any) -> Tensor:
            return await self.model.encode(seen)

        return Latents(self.engine.run(walk))

    def predict(self, latents: Any, context_mask: Any = None, target_mask: Any = None) -> Latents:
        """What the predictor makes of a clip's tokens, `[targets, hidden]`.

        Args:
            latents: of `encode`, or an array `[tokens, hidden]`, of a whole clip.
            context_mask, target_mask: numbers of the tokens that are seen, and of those that are
                predicted; all of the clip's if left out.

        Raises:
            InvalidRequest: latents or masks do not fit.
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

        async def walk(_: Any) -> Tensor:
            return await model.predict(model.asked(tokens, masks))

        return Latents(self.engine.run(walk))
