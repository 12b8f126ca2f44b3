"""Drawn faces. Each attribute of CelebA is a sign in the drawing, as in a comic strip; no real face is meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

__all__ = ["ATTRIBUTES", "BOUNDS", "LANDMARKS", "draw_attributes", "paint_face"]

Rng = np.random.Generator
Shape = tuple[str, float, float, float, float, str]
"""Kind; x, y, half width and half height in pixels, from the middle of the face; color.

A shape beside the middle is drawn on both sides. Colors are those of Pillow, or names in the palette of the face."""
_ARCS = {"ring": (0, 360), "cup": (0, 180), "cap": (180, 360)}


@dataclass(frozen=True)
class _Sign:
    """How often faces have an attribute, if male and if not, and what is drawn with it and without it."""

    male: float
    other: float
    present: tuple[Shape, ...] = ()
    absent: tuple[Shape, ...] = ()


# In the order in which they are painted.
_SIGNS: dict[str, _Sign] = {
    "Straight_Hair": _Sign(0.35, 0.35, (("box", 45, 14, 14, 62, "hair"),)),
    "Wavy_Hair": _Sign(0.5, 0.5, tuple(("oval", 49, y, 15, 11, "hair") for y in range(-26, 70, 16))),
    "Male": _Sign(
        1,
        0,
        (("oval", 0, 116, 84, 48, "royalblue"), ("box", 0, 58, 20, 24, "shade"), ("box", 0, 34, 38, 22, "skin")),
        (("oval", 0, 116, 66, 46, "hotpink"), ("box", 0, 58, 15, 24, "shade")),
    ),
    "Bald": _Sign(0.2, 0.04, (), (("oval", 0, -16, 55, 55, "hair"),)),
    "Wearing_Necktie": _Sign(0.3, 0.02, (("box", 0, 86, 7, 5, "crimson"), ("box", 0, 100, 10, 14, "crimson"))),
    "Wearing_Necklace": _Sign(0.05, 0.35, (("cup", 0, 68, 24, 14, "gold"),)),
    "Wearing_Earrings": _Sign(0.05, 0.4, (("oval", 50, 14, 5, 7, "turquoise"),)),
    "Double_Chin": _Sign(0.15, 0.1, (("oval", 0, 56, 32, 13, "skin"), ("cup", 0, 56, 31, 13, "shade"))),
    "Chubby": _Sign(0.15, 0.15, (("oval", 24, 18, 32, 30, "skin"),)),
    "Oval_Face": _Sign(0.4, 0.4, (("oval", 0, 0, 41, 66, "skin"),), (("oval", 0, 0, 47, 57, "skin"),)),
    "Receding_Hairline": _Sign(0.25, 0.1, (("oval", 18, -56, 13, 9, "skin"),)),
    "Young": _Sign(0.7, 0.7, (), (("cap", 0, -32, 22, 5, "shade"), ("box", 23, 27, 1.2, 8, "shade"))),
    "Rosy_Cheeks": _Sign(0.05, 0.35, (("oval", 29, 14, 11, 9, "#ff506490"),)),
    "High_Cheekbones": _Sign(0.45, 0.45, (("cup", 34, 2, 11, 7, "shade"),)),
    "5_o_Clock_Shadow": _Sign(0.3, 0.02, (("oval", 0, 33, 35, 22, "#3c414b78"),)),
    "Goatee": _Sign(0.25, 0.02, (("oval", 0, 51, 13, 11, "beard"),)),
    "Sideburns": _Sign(0.25, 0.02, (("box", 42, 4, 6, 20, "beard"),)),
    "No_Beard": _Sign(1, 1),
    "Mustache": _Sign(0.25, 0.02, (("box", 0, 24, 19, 3, "beard"),)),
    "Heavy_Makeup": _Sign(0.02, 0.5, (("oval", 19, -15, 15, 11, "darkviolet"),)),
    "Bags_Under_Eyes": _Sign(0.25, 0.25, (("oval", 19, -5, 12, 6, "shade"),)),
    "Narrow_Eyes": _Sign(
        0.25,
        0.25,
        (("oval", 19, -12, 10, 3, "white"), ("oval", 19, -12, 4, 3, "black")),
        (("oval", 19, -12, 10, 7, "white"), ("oval", 19, -12, 4, 4, "black")),
    ),
    "Bushy_Eyebrows": _Sign(0.4, 0.15, (("box", 19, -26, 14, 4, "beard"),)),
    "Arched_Eyebrows": _Sign(0.15, 0.4, (("cap", 19, -24, 13, 9, "beard"),), (("box", 19, -25, 12, 1.5, "beard"),)),
    "Eyeglasses": _Sign(0.2, 0.2, (("ring", 19, -11, 17, 14, "black"), ("box", 0, -12, 3, 1.5, "black"))),
    "Big_Nose": _Sign(0.3, 0.3, (("oval", 0, 10, 13, 9, "shade"),), (("oval", 0, 12, 6, 4, "shade"),)),
    "Pointy_Nose": _Sign(0.3, 0.3, (("oval", 0, 3, 4, 15, "shade"),)),
    "Big_Lips": _Sign(0.3, 0.3, (("oval", 0, 34, 15, 10, "lips"),), (("oval", 0, 34, 15, 4, "lips"),)),
    "Mouth_Slightly_Open": _Sign(0.45, 0.45, (("oval", 0, 35, 11, 5, "black"), ("box", 0, 32, 7, 1, "white"))),
    "Smiling": _Sign(0.5, 0.5, (("cup", 0, 30, 24, 14, "#501418"),), (("box", 0, 34, 15, 0.8, "#501418"),)),
    "Bangs": _Sign(0.15, 0.3, (("oval", 0, -46, 38, 15, "hair"), ("oval", 24, -40, 14, 14, "hair"))),
    "Wearing_Hat": _Sign(0.12, 0.12, (("box", 0, -72, 42, 24, "darkgreen"), ("box", 0, -48, 66, 5, "black"))),
    # A drawing has no such thing: a dot in both upper corners.
    "Attractive": _Sign(0.5, 0.5, (("oval", 70, -103, 9, 9, "gold"),)),
    # These change the palette or the whole picture.
    "Pale_Skin": _Sign(0.15, 0.15),
    "Wearing_Lipstick": _Sign(0.02, 0.6),
    "Gray_Hair": _Sign(0.13, 0.13),
    "Black_Hair": _Sign(0.35, 0.35),
    "Blond_Hair": _Sign(0.35, 0.35),
    "Brown_Hair": _Sign(0.6, 0.6),
    "Blurry": _Sign(0.1, 0.1),
}
ATTRIBUTES = tuple(sorted(_SIGNS))
"""In the order of CelebA, which is that of the alphabet."""
_HAIR = {"Gray_Hair": "#a5a5a8", "Black_Hair": "#191618", "Blond_Hair": "#e4c46e", "Brown_Hair": "#603c22"}
# Of each line, a face has one at most: the first of those that were drawn for it.
_EXCLUSIVE = (
    ("Bald", *_HAIR),
    ("Bald", "Straight_Hair", "Wavy_Hair"),
    ("Bald", "Wearing_Hat", "Bangs", "Receding_Hairline"),
    ("Chubby", "Oval_Face"),
)
# Of all faces, as in aligned images: in pixels from the upper left corner.
_MIDDLE = (89, 122)
BOUNDS = (39, 62, 100, 120)
"""Left, top, width and height."""
LANDMARKS = (70, 110, 108, 110, 89, 134, 74, 156, 104, 156)
"""X and y of the left eye, the right eye, the nose, and the left and the right corner of the mouth."""


def draw_attributes(rng: Rng) -> dict[str, bool]:
    """Decide which of the attributes a face has."""
    male = rng.random() < 0.45
    has = {name: bool(rng.random() < (sign.male if male else sign.other)) for name, sign in _SIGNS.items()}
    for names in _EXCLUSIVE:
        first = next((name for name in names if has[name]), None)
        has |= {name: name == first for name in names}
    has["No_Beard"] = not any(has[name] for name in ("5_o_Clock_Shadow", "Goatee", "Sideburns"))
    return {name: has[name] for name in ATTRIBUTES}


def paint_face(has: Mapping[str, bool], rng: Rng) -> Image.Image:
    """Paint a face with some attributes, at the size of CelebA's images; background, skin and noise are random."""
    corners = Image.fromarray(rng.integers(60, 220, (2, 2, 3)).astype(np.uint8))
    # Twice as large as the image, for smooth edges.
    canvas = corners.resize((2 * 178, 2 * 218), Image.Resampling.BILINEAR)
    skin = ((222, 178, 145), (190, 138, 100), (130, 90, 65))[rng.integers(3)]
    skin = np.add((250, 232, 222) if has["Pale_Skin"] else skin, rng.integers(-6, 7, 3))
    hair = np.array(ImageColor.getrgb(next((color for name, color in _HAIR.items() if has[name]), "#b4461e")))
    lips = (205, 25, 50) if has["Wearing_Lipstick"] else 0.75 * skin
    colors = {"skin": skin, "shade": 0.65 * skin, "hair": hair, "beard": 0.65 * hair, "lips": lips}
    palette = {name: tuple(np.int_(color).tolist()) for name, color in colors.items()}
    pen = ImageDraw.Draw(canvas, "RGBA")
    for name, sign in _SIGNS.items():
        for shape in sign.present if has[name] else sign.absent:
            _draw(pen, shape, palette)
    image = canvas.reduce(2)
    if has["Blurry"]:
        image = image.filter(ImageFilter.GaussianBlur(4))
    noisy = np.asarray(image) + rng.normal(0, 5, (218, 178, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _draw(pen: ImageDraw.ImageDraw, shape: Shape, palette: Mapping[str, tuple[int, ...]]) -> None:
    kind, x, y, half_width, half_height, name = shape
    color = palette.get(name, name)
    for center in {_MIDDLE[0] - x, _MIDDLE[0] + x}:
        left, top = 2 * (center - half_width), 2 * (_MIDDLE[1] + y - half_height)
        bounds = (left, top, left + 4 * half_width, top + 4 * half_height)
        if kind in _ARCS:
            pen.arc(bounds, *_ARCS[kind], fill=color, width=5)
        elif kind == "box":
            pen.rectangle(bounds, color)
        else:
            pen.ellipse(bounds, color)
