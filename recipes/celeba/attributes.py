"""The 40 attributes of CelebA."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ATTRIBUTES", "SINGLE_TASK_F1", "check_attributes"]

SINGLE_TASK_F1: dict[str, float] = {
    "5_o_Clock_Shadow": 0.6736886,
    "Arched_Eyebrows": 0.68121034,
    "Attractive": 0.81524944,
    "Bags_Under_Eyes": 0.5760289,
    "Bald": 0.7205613,
    "Bangs": 0.8555076,
    "Big_Lips": 0.38203922,
    "Big_Nose": 0.58225113,
    "Black_Hair": 0.787647,
    "Blond_Hair": 0.8321292,
    "Blurry": 0.5029583,
    "Brown_Hair": 0.68694085,
    "Bushy_Eyebrows": 0.6781237,
    "Chubby": 0.5240381,
    "Double_Chin": 0.5161666,
    "Eyeglasses": 0.95694304,
    "Goatee": 0.6968786,
    "Gray_Hair": 0.67976356,
    "Heavy_Makeup": 0.8808315,
    "High_Cheekbones": 0.8582131,
    "Male": 0.97034,
    "Mouth_Slightly_Open": 0.93267566,
    "Mustache": 0.5057539,
    "Narrow_Eyes": 0.40307626,
    "No_Beard": 0.9703734,
    "Oval_Face": 0.48644206,
    "Pale_Skin": 0.60786104,
    "Pointy_Nose": 0.5261031,
    "Receding_Hairline": 0.56907415,
    "Rosy_Cheeks": 0.59815097,
    "Sideburns": 0.6858371,
    "Smiling": 0.924108,
    "Straight_Hair": 0.5424991,
    "Wavy_Hair": 0.7406311,
    "Wearing_Earrings": 0.71019936,
    "Wearing_Hat": 0.87365365,
    "Wearing_Lipstick": 0.9305602,
    "Wearing_Necklace": 0.33704284,
    "Wearing_Necktie": 0.7647628,
    "Young": 0.91907,
}
"""Attribute to the F1 of a network that is trained on it alone. Published Δm% are relative to these values."""

ATTRIBUTES: tuple[str, ...] = tuple(SINGLE_TASK_F1)
"""The attributes in the order of `list_attr_celeba.txt`."""


def check_attributes(names: Sequence[str]) -> None:
    """Raise a ValueError if there is no name, an unknown one, or one twice."""
    if not names or len(set(names)) != len(names) or not set(names) <= set(ATTRIBUTES):
        raise ValueError(f"attributes={names!r} must name one or more of {ATTRIBUTES}, each once.")
