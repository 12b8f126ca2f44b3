"""Pictures of faces, each attribute a feature of the drawing.

They are signs for attributes, as in a comic strip; nothing about real faces is meant or modelled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recipes.scenes.faces import FACE_SIZE, Colour, Face, Point, near_colour

__all__ = ["paint_face"]

Rng = np.random.Generator
# Drawn larger, then reduced, for smooth edges.
_ZOOM = 2
_INK: Colour = (40, 28, 26)


def paint_face(face: Face, rng: Rng) -> Image.Image:
    """Paint a face, at the size of `FACE_SIZE`.

    Args:
        face: What it looks like.
        rng: Decides background, eyes, hat and noise.
    """
    width, height = FACE_SIZE
    corners = Image.fromarray(rng.integers(60, 220, (2, 2, 3)).astype(np.uint8))
    canvas = corners.resize((_ZOOM * width, _ZOOM * height), Image.Resampling.BILINEAR)
    pen = _Pen(canvas, face.middle)
    _draw_behind(pen, face)
    _draw_skin(pen, face)
    _draw_beard(pen, face)
    _draw_eyes(pen, face, rng)
    _draw_nose_and_mouth(pen, face)
    _draw_above(pen, face, rng)
    if face.has["Attractive"]:
        _draw_star(_Pen(canvas, (0.0, 0.0)))
    image = canvas.reduce(_ZOOM)
    if face.has["Blurry"]:
        image = image.filter(ImageFilter.GaussianBlur(4.0))
    noisy = np.asarray(image) + rng.normal(0, 5, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


class _Pen:
    """Draws in coordinates relative to the middle of the face, in pixels of the finished picture."""

    def __init__(self, canvas: Image.Image, middle: Point) -> None:
        self._draw = ImageDraw.Draw(canvas, "RGBA")
        self._middle = middle

    def at(self, *points: Point) -> list[Point]:
        return [(_ZOOM * (x + self._middle[0]), _ZOOM * (y + self._middle[1])) for x, y in points]

    def oval(self, x: float, y: float, half_width: float, half_height: float, fill: Sequence[int]) -> None:
        self._draw.ellipse(self.at((x - half_width, y - half_height), (x + half_width, y + half_height)), tuple(fill))

    def shape(self, points: Sequence[Point], fill: Sequence[int]) -> None:
        self._draw.polygon([xy for point in self.at(*points) for xy in point], tuple(fill))

    def line(self, points: Sequence[Point], fill: Sequence[int], width: float) -> None:
        self._draw.line(self.at(*points), tuple(fill), round(_ZOOM * width), joint="curve")

    def bow(self, x: float, y: float, half_width: float, rise: float, fill: Sequence[int], width: float) -> None:
        """A line with its ends at the height y and its middle above them, or below if `rise` is negative."""
        steps = np.linspace(-1, 1, 13)
        self.line([(x + half_width * step, y - rise * (1 - step**2)) for step in steps.tolist()], fill, width)

    def ring(
        self, x: float, y: float, half_width: float, half_height: float, fill: Sequence[int], width: float
    ) -> None:
        low, high = self.at((x - half_width, y - half_height), (x + half_width, y + half_height))
        self._draw.ellipse([low, high], outline=tuple(fill), width=round(_ZOOM * width))


def _darker(colour: Colour, share: float) -> Colour:
    red, green, blue = (round(share * part) for part in colour)
    return red, green, blue


def _draw_behind(pen: _Pen, face: Face) -> None:
    """Long hair, shoulders, neck and what is worn there, ears."""
    width, height = face.half_width, face.half_height
    if not face.has["Bald"]:
        length = 20.0 if face.has["Male"] else 75.0
        if face.has["Wavy_Hair"]:
            for y in np.arange(-height * 0.6, length, 13).tolist():
                for side in (-1, 1):
                    pen.oval(side * (width + 6), y, 14, 10, face.hair)
        else:
            flare = 14.0 if face.has["Straight_Hair"] else 8.0
            end = length if face.has["Straight_Hair"] else length - 25
            pen.shape([(-width - 5, -30), (width + 5, -30), (width + flare, end), (-width - flare, end)], face.hair)
        pen.oval(0, -14, width + 9, height - 4, face.hair)
    pen.oval(0, 112, 82 if face.has["Male"] else 68, 50, face.clothes)
    pen.shape([(-19, 30), (19, 30), (21, 74), (0, 84), (-21, 74)], _darker(face.skin, 0.88))
    if face.has["Wearing_Necktie"]:
        pen.shape([(-24, 66), (0, 84), (24, 66), (30, 74), (0, 104), (-30, 74)], (240, 240, 240))
        pen.shape([(-8, 80), (8, 80), (4, 88), (11, 110), (-11, 110), (-4, 88)], (200, 30, 40))
    if face.has["Wearing_Necklace"]:
        for step in np.linspace(-1, 1, 9).tolist():
            pen.oval(23 * step, 82 - 14 * step**2, 3.4, 3.4, (250, 220, 70))
    for side in (-1, 1):
        pen.oval(side * (width + 2), -4, 6, 11, _darker(face.skin, 0.92))
        if face.has["Wearing_Earrings"]:
            pen.oval(side * (width + 4), 12, 4.5, 6.5, (60, 230, 240))


def _draw_skin(pen: _Pen, face: Face) -> None:
    """The face, its folds and its cheeks."""
    if face.has["Double_Chin"]:
        pen.oval(0, face.half_height - 2, 0.62 * face.half_width, 13, _darker(face.skin, 0.9))
        pen.bow(0, face.half_height - 1, 0.55 * face.half_width, -8, _darker(face.skin, 0.6), 2)
    pen.shape(face.outline(), face.skin)
    pen.line([*face.outline(), face.outline()[0]], _darker(face.skin, 0.75), 1)
    for side in (-1, 1):
        if face.has["Rosy_Cheeks"]:
            pen.oval(side * 27, 13, 10, 9, (255, 80, 100, 130))
        if face.has["High_Cheekbones"]:
            pen.line([(side * 20, 10), (side * 32, 6), (side * 39, -3)], _darker(face.skin, 0.68), 2.5)
    if not face.has["Young"]:
        for y in (-37, -31):
            pen.bow(0, y, 22, 2, _darker(face.skin, 0.6), 1.8)
        for side in (-1, 1):
            pen.line([(side * 12, 16), (side * 21, 27), (side * 22, 36)], _darker(face.skin, 0.6), 1.8)


def _draw_beard(pen: _Pen, face: Face) -> None:
    dark = _darker(face.hair, 0.75)
    if face.has["5_o_Clock_Shadow"]:
        pen.shape(face.outline(top=0.28), (60, 65, 75, 95))
    for side in (-1, 1):
        if face.has["Sideburns"]:
            edge = face.half_width
            pen.shape([(side * edge, -18), (side * (edge - 10), -18), (side * (edge - 9), 20), (side * edge, 16)], dark)
    if face.has["Goatee"]:
        pen.oval(0, face.half_height - 9, 12, 12, dark)
    if face.has["Mustache"]:
        y = face.mouth_y - 8
        pen.shape([(0, y - 4), (17, y + 1), (21, y + 6), (0, y + 4), (-21, y + 6), (-17, y + 1)], dark)


def _draw_eyes(pen: _Pen, face: Face, rng: Rng) -> None:
    iris = [(70, 110, 170), (80, 130, 70), (80, 50, 30)][rng.integers(3)]
    opening = 3.0 if face.has["Narrow_Eyes"] else 6.5
    brow = (0.55, 6.0) if face.has["Bushy_Eyebrows"] else (0.7, 2.2)
    for side in (-1, 1):
        x, y = side * face.eye_x, face.eye_y
        if face.has["Heavy_Makeup"]:
            pen.oval(x, y - 3, 13, 9.5, (130, 50, 160, 190))
        if face.has["Bags_Under_Eyes"]:
            pen.oval(x, y + 8, 10, 6, _darker(face.skin, 0.6))
        pen.oval(x, y, 10, opening, (250, 250, 250))
        pen.oval(x, y, min(5.0, opening), min(5.0, opening), iris)
        pen.oval(x, y, 2.2, 2.2, (10, 10, 10))
        pen.bow(x, y, 10.5, opening, _INK, 2.2 if face.has["Heavy_Makeup"] else 1.2)
        rise = 7.0 if face.has["Arched_Eyebrows"] else 1.0
        pen.bow(x, y - 13, 12, rise, _darker(face.hair, brow[0]), brow[1])
        if face.has["Eyeglasses"]:
            pen.ring(x, y + 1, 15, 13, (15, 15, 20), 3)
    if face.has["Eyeglasses"]:
        pen.line([(-face.eye_x + 15, face.eye_y), (face.eye_x - 15, face.eye_y)], (15, 15, 20), 3)


def _draw_nose_and_mouth(pen: _Pen, face: Face) -> None:
    shade, y = _darker(face.skin, 0.6), face.nose_y
    if face.has["Pointy_Nose"]:
        pen.shape([(0, -8), (8, y + 2), (0, y + 6), (-8, y + 2)], shade)
    else:
        half = 12.0 if face.has["Big_Nose"] else 6.0
        pen.oval(0, y - 0.3 * half, half, 0.75 * half, shade)
        pen.line([(-3, -6), (-3, y - 4)], shade, 1.5)

    y, half = face.mouth_y, face.mouth
    lip = (205, 25, 50) if face.has["Wearing_Lipstick"] else _darker(face.skin, 0.68)
    thick = 6.0 if face.has["Big_Lips"] else 2.6
    curve = -8.0 if face.has["Smiling"] else 1.5
    # The ends of a smile go up, so that its middle stays where it is.
    ends = y + curve / 2
    if face.has["Mouth_Slightly_Open"]:
        steps = np.linspace(-1, 1, 13).tolist()
        gap = [(half * step, ends - (curve + 5) * (1 - step**2)) for step in steps]
        gap += [(half * step, ends - (curve - 5) * (1 - step**2)) for step in reversed(steps)]
        pen.shape(gap, (70, 15, 20))
        pen.bow(0, ends, half, curve + 4, (245, 245, 245), 2.0)
        pen.bow(0, ends, half, curve + 6, lip, thick)
        pen.bow(0, ends, half, curve - 6, lip, thick)
    else:
        pen.bow(0, ends, half, curve, lip, 2 * thick)
        pen.bow(0, ends, half, curve, _darker(lip, 0.6), 1.0)


def _draw_above(pen: _Pen, face: Face, rng: Rng) -> None:
    """The hair on the head, or the hat."""
    width, height = face.half_width, face.half_height
    if not face.has["Bald"]:
        line = -0.84 if face.has["Receding_Hairline"] else -0.62
        heights = np.linspace(-1, line, 12)
        side = (width + 8) * (1 - (0.92 * heights) ** 2) ** 0.5
        crown = [(x, (height + 7) * y) for x, y in zip(side.tolist(), heights.tolist(), strict=True)]
        pen.shape([*crown, *((-x, y) for x, y in reversed(crown))], face.hair)
    if face.has["Bangs"]:
        for x in np.linspace(-0.72, 0.72, 7).tolist():
            pen.shape([(x * width - 8, -40), (x * width + 8, -40), (x * width, -19)], face.hair)
        pen.shape([(-0.8 * width, -44), (0.8 * width, -44), (0.85 * width, -29), (-0.85 * width, -29)], face.hair)
    if face.has["Wearing_Hat"]:
        felt = near_colour([(60, 110, 60), (150, 40, 40), (60, 60, 70)][rng.integers(3)], rng, 15)
        pen.shape([(-width, -42), (-0.8 * width, -92), (0.8 * width, -92), (width, -42)], felt)
        pen.shape([(-width, -52), (width, -52), (width, -42), (-width, -42)], _darker(felt, 0.5))
        pen.oval(0, -40, width + 24, 7, felt)


def _draw_star(pen: _Pen) -> None:
    """A star in the corner: the one attribute that is no feature of a drawing."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 7.0, 16.0)
    points = zip((20 + radii * np.cos(angles)).tolist(), (20 + radii * np.sin(angles)).tolist(), strict=True)
    pen.shape(list(points), (255, 225, 40))
