"""The sizes of pi0.5's networks, and the variants that configs name."""

from __future__ import annotations

from dataclasses import dataclass

from mstar.models.fields import check_fields, check_multiple

__all__ = ["VARIANTS", "GemmaSizes", "VisionSizes"]


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower: SigLIP So400m/14.

    Raises:
        ValueError: a value that no such network can have.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: tuple[int, int] = (224, 224)
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self)
        check_multiple(vars(self), "hidden_size", self.num_attention_heads, "the heads")

    @property
    def layers(self) -> int:
        """Layers of the tower."""
        return self.num_hidden_layers

    @property
    def patch_dim(self) -> int:
        """Values of one patch."""
        return 3 * self.patch_size**2

    @property
    def positions(self) -> int:
        """Patches of one image."""
        return (self.image_size[0] // self.patch_size) * (self.image_size[1] // self.patch_size)


@dataclass(frozen=True)
class GemmaSizes:
    """One of the two Gemmas: the prefix, or the action expert.

    Raises:
        ValueError: a value that no such network can have.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide the {self.num_heads} heads"
            )
        if self.head_dim % 2 or self.width % 2:
            raise ValueError(f"head_dim={self.head_dim}, width={self.width}: must be even")


VARIANTS = {
    "gemma_2b": GemmaSizes(2048, 18, 16384, 8, 1, 256),
    "gemma_300m": GemmaSizes(1024, 18, 4096, 8, 1, 256),
}
