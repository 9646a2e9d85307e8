"""A clip to latents, to what the model expects of the hidden half, and to labels.

python examples/vjepa2_clip.py [model]
"""

import sys

import numpy as np

from mstar import Engine


def clip(frames: int = 16, side: int = 96) -> np.ndarray:
    """A bright square that moves to the right, uint8 [frames, side, side, 3]."""
    video = np.full((frames, side, side, 3), 40, np.uint8)
    for time, frame in enumerate(video):
        left = time * side // (2 * frames)
        frame[side // 4 : side // 2, left : left + side // 4] = 220
    return video


def main(model: str) -> None:
    with Engine(model) as engine:
        latents = engine.encode(clip())
        print("latents:", latents.shape)

        half = len(latents) // 2  # tokens are numbered by time first
        hidden = range(half, 2 * half)
        predicted = engine.predict(latents, context_mask=range(half), target_mask=hidden)
        seen, guessed = latents.numpy()[half:], predicted.numpy()
        seen = (seen - seen.mean(1, keepdims=True)) / seen.std(1, keepdims=True)  # as in training
        print(f"second half from the first: L1 {abs(seen - guessed).mean():.3f}")

        for event in engine.stream(video=clip(), rollout_horizon=3, stream_rollout=True):
            if event.modality == "latent":
                print("one second on:", event.latents.shape)

        result = engine.generate(video=clip(), classify=True, top_k=3)
        for label, score in zip(result.labels, result.scores, strict=True):
            print(f"{score:.3f} {label}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["vjepa2-tiny"])
