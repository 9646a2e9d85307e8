"""A contact sheet: drawings from several prompts and guidance scales, an edit, and their captions.

python examples/bagel_gallery.py [gallery.png] [model] [weights]

With the tiny checkpoint (the default, random weights) the pictures show nothing but colours. With
`bagel` and a folder of the published weights they are what the prompts say.
"""

from __future__ import annotations

import io
import sys

from PIL import Image, ImageDraw

from mstar import Engine

PROMPTS = ["A red bicycle", "A paper boat", "A fox in snow"]
SCALES = [1.0, 4.0, 8.0]
EDIT = "Make it winter"
MARGIN, CAPTION = 8, 14


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Rows of captioned pictures of one size."""
    width, height = rows[0][0][1].size
    step = width + MARGIN, height + MARGIN + CAPTION
    size = len(rows[0]) * step[0] + MARGIN, len(rows) * step[1] + MARGIN
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (caption, picture) in enumerate(row):
            corner = MARGIN + x * step[0], MARGIN + y * step[1]
            page.paste(picture.resize((width, height)), corner)
            draw.text((corner[0], corner[1] + height + 1), caption[: width // 6], fill="black")
    return page


path, model, *weights = [*sys.argv[1:], *["gallery.png", "bagel-tiny"][len(sys.argv) - 1 :]]
with Engine(model, weights=weights[0] if weights else None) as engine:
    # Everything is asked for at once and drawn together.
    drawings = [
        [
            engine.submit(
                text=prompt,
                output_modalities=("image",),
                cfg_text_scale=scale,
                num_timesteps=20,
                seed=index,
            )
            for scale in SCALES
        ]
        for index, prompt in enumerate(PROMPTS)
    ]
    rows = []
    for prompt, row in zip(PROMPTS, drawings, strict=True):
        pngs = [drawing.result().images[0] for drawing in row]
        edit = engine.generate_image(EDIT, images=pngs[1], num_timesteps=20, seed=0)
        captions = [f"{scale:g}: {prompt}" for scale in SCALES] + [EDIT]
        rows.append(list(zip(captions, map(opened, [*pngs, edit]), strict=True)))
        answer = engine.chat("What is it?", images=edit, max_output_tokens=8)
        print(f"{prompt}: {answer.text!r}")
    sheet(rows).save(path)
    print(f"wrote {path}")
