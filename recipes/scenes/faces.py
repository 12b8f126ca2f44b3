"""The numbers and colours of drawn faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FACE_SIZE", "Colour", "Face", "Point", "draw_face", "near_colour"]

Rng = np.random.Generator
Point = tuple[float, float]
Colour = tuple[int, int, int]

FACE_SIZE = (178, 218)
"""Width and height of CelebA's aligned images."""
_HAIR: dict[str, Colour] = {
    "Black_Hair": (25, 22, 24),
    "Blond_Hair": (228, 196, 110),
    "Brown_Hair": (96, 60, 34),
    "Gray_Hair": (165, 165, 168),
}
_UNNAMED_HAIR: Colour = (165, 70, 30)
_PALE: Colour = (250, 232, 222)
_SKINS: tuple[Colour, ...] = ((222, 178, 145), (190, 138, 100), (130, 90, 65))


@dataclass(frozen=True)
class Face:
    """All numbers and colours of a face, which its attributes and chance decide; lengths are in pixels.

    Args:
        has: Whether it has them, for all 40 attributes.
        middle: Of the face, from the picture's top left corner.
        half_width: Of the face.
        half_height: Of the face.
        jaw: How square the lower half is: 2 is an ellipse.
        eye_x: Of the right eye, from the middle.
        eye_y: Of the eyes, from the middle.
        nose_y: From the middle.
        mouth_y: From the middle.
        mouth: Half the width of the mouth.
        skin: Colour, 0 to 255.
        hair: Colour.
        clothes: Colour.
    """

    has: Mapping[str, bool]
    middle: Point
    half_width: float
    half_height: float
    jaw: float
    eye_x: float
    eye_y: float
    nose_y: float
    mouth_y: float
    mouth: float
    skin: Colour
    hair: Colour
    clothes: Colour

    def outline(self, top: float = -1.0) -> list[Point]:
        """The outline of the face from its middle, below a share of its height."""
        heights = np.linspace(top, 1, 40)
        powers = np.where(heights > 0, self.jaw, 2.0)
        xs = self.half_width * (1 - np.abs(heights) ** powers) ** 0.5
        right = list(zip(xs.tolist(), (self.half_height * heights).tolist(), strict=True))
        return right + [(-x, y) for x, y in reversed(right)]

    @property
    def landmarks(self) -> tuple[Point, ...]:
        """Left eye, right eye, nose, left and right corner of the mouth in the picture, as (x, y)."""
        places = [(side * self.eye_x, self.eye_y) for side in (-1, 1)] + [(0, self.nose_y)]
        places += [(side * self.mouth, self.mouth_y) for side in (-1, 1)]
        return tuple((self.middle[0] + x, self.middle[1] + y) for x, y in places)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the face in the picture."""
        left, top = self.middle[0] - self.half_width, self.middle[1] - self.half_height
        return left, top, 2 * self.half_width, 2 * self.half_height


def draw_face(has: Mapping[str, bool], rng: Rng) -> Face:
    """Decide what a face looks like.

    Args:
        has: Whether it has them, for all 40 attributes.
        rng: Decides what the attributes leave open.
    """
    half_width, half_height = 45.0, 58.0
    if has["Chubby"]:
        half_width = 53.0
    if has["Oval_Face"]:
        half_width, half_height = 40.0, 62.0
    hair = next((colour for name, colour in _HAIR.items() if has[name]), _UNNAMED_HAIR)
    skin = _PALE if has["Pale_Skin"] else _SKINS[rng.integers(len(_SKINS))]
    return Face(
        has,
        middle=(FACE_SIZE[0] / 2 + rng.uniform(-3, 3), 122 + rng.uniform(-3, 3)),
        half_width=half_width + rng.uniform(-1.5, 1.5),
        half_height=half_height + rng.uniform(-1.5, 1.5),
        jaw=4.5 if has["Male"] else 2.0,
        eye_x=19 + rng.uniform(-1, 1),
        eye_y=-12 + rng.uniform(-1, 1),
        nose_y=13 + rng.uniform(-1, 1),
        mouth_y=32 + rng.uniform(-1, 1),
        mouth=15 + rng.uniform(-1.5, 1.5),
        skin=near_colour(skin, rng, 8),
        hair=near_colour(hair, rng, 8),
        clothes=near_colour((45, 55, 90) if has["Male"] else (190, 60, 100), rng, 25),
    )


def near_colour(colour: Sequence[int], rng: Rng, spread: int) -> Colour:
    """A colour changed a little at random, by `spread` of 255 at most."""
    red, green, blue = np.clip(colour + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return red, green, blue
