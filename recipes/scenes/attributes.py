"""The 40 attributes of CelebA, and which of them a drawn face has."""

from __future__ import annotations

import numpy as np

__all__ = ["ATTRIBUTES", "draw_attributes"]

Rng = np.random.Generator

ATTRIBUTES: tuple[str, ...] = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)
"""In the order of list_attr_celeba.txt."""

# How often a face has what depends on nothing else.
_ALONE = {
    "Attractive": 0.5,
    "Bags_Under_Eyes": 0.25,
    "Big_Lips": 0.3,
    "Big_Nose": 0.3,
    "Blurry": 0.1,
    "Bushy_Eyebrows": 0.25,
    "Chubby": 0.15,
    "Eyeglasses": 0.2,
    "High_Cheekbones": 0.45,
    "Mouth_Slightly_Open": 0.45,
    "Narrow_Eyes": 0.2,
    "Pale_Skin": 0.15,
    "Pointy_Nose": 0.3,
    "Smiling": 0.5,
    "Wearing_Hat": 0.12,
    "Young": 0.7,
}
# How often a face has what depends on `Male`: with it, and without.
_BY_MALE = {
    "5_o_Clock_Shadow": (0.3, 0.0),
    "Arched_Eyebrows": (0.1, 0.4),
    "Bald": (0.2, 0.0),
    "Bangs": (0.15, 0.3),
    "Goatee": (0.2, 0.0),
    "Heavy_Makeup": (0.0, 0.5),
    "Mustache": (0.2, 0.0),
    "Receding_Hairline": (0.25, 0.05),
    "Rosy_Cheeks": (0.05, 0.3),
    "Sideburns": (0.25, 0.0),
    "Wearing_Earrings": (0.05, 0.4),
    "Wearing_Lipstick": (0.0, 0.6),
    "Wearing_Necklace": (0.05, 0.3),
    "Wearing_Necktie": (0.25, 0.0),
}
_HAIR_COLOURS = {"Black_Hair": 0.3, "Blond_Hair": 0.2, "Brown_Hair": 0.25, "Gray_Hair": 0.12}


def draw_attributes(rng: Rng) -> dict[str, bool]:
    """Decide what a face looks like.

    Some attributes exclude others: a bald head has no hair to speak of, one hair colour is enough, and a face is either
    chubby or oval. `No_Beard` is the absence of shadow, goatee and sideburns; about every eighth face has a hair colour
    that none of the attributes names.

    Args:
        rng: Decides.

    Returns:
        Whether the face has it, for each of `ATTRIBUTES` and in their order.
    """
    male = bool(rng.random() < 0.45)
    has = {"Male": male} | {name: bool(rng.random() < chance) for name, chance in _ALONE.items()}
    has |= {name: bool(rng.random() < chances[not male]) for name, chances in _BY_MALE.items()}

    has["Bald"] &= not has["Wearing_Hat"]
    for name in ("Bangs", "Receding_Hairline"):
        has[name] &= not has["Bald"] and not has["Wearing_Hat"]
    has["Receding_Hairline"] &= not has["Bangs"]
    has["Arched_Eyebrows"] &= not has["Bushy_Eyebrows"]
    has["Pointy_Nose"] &= not has["Big_Nose"]
    has["Double_Chin"] = has["Chubby"] and bool(rng.random() < 0.7)
    has["Oval_Face"] = not has["Chubby"] and bool(rng.random() < 0.4)
    has["No_Beard"] = not (has["5_o_Clock_Shadow"] or has["Goatee"] or has["Sideburns"])

    colour, curl = rng.random(), rng.random()
    below = 0.0
    for name, chance in _HAIR_COLOURS.items():
        has[name] = not has["Bald"] and below <= colour < below + chance
        below += chance
    has["Straight_Hair"] = not has["Bald"] and bool(curl < 0.35)
    has["Wavy_Hair"] = not has["Bald"] and bool(0.35 <= curl < 0.75)
    return {name: has[name] for name in ATTRIBUTES}
