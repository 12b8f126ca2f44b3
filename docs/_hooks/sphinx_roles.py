"""Lets the docstrings be written like those of PyTorch: Sphinx roles become Markdown when the site is built."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?P<role>attr|class|data|exc|func|math|meth|mod|obj):`(?P<text>[^`]+)`")
_MATH_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*\n)(?P<rest>(?:(?P=indent) +.*\n|\s*\n)*)", re.MULTILINE
)


class SphinxRoles(griffe.Extension):
    """Turns ``:math:`` into ``$...$`` and the roles that name an object into code, linked where it is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Translate the docstring of an object once it is loaded."""
        if obj.docstring is None:
            return
        text = _MATH_BLOCK.sub(_math_block, obj.docstring.value + "\n")
        obj.docstring.value = _ROLE.sub(lambda match: _role(match, obj), text).rstrip("\n")


def _math_block(match: re.Match[str]) -> str:
    lines = [line.strip() for line in (match["first"] + match["rest"]).splitlines()]
    return match["indent"] + "$$" + " ".join(line for line in lines if line) + "$$\n\n"


def _role(match: re.Match[str], obj: griffe.Object) -> str:
    if match["role"] == "math":
        return f"${match['text']}$"
    target = match["text"].removeprefix("~")
    text = target.rpartition(".")[2] if match["text"].startswith("~") else target
    try:
        path = obj.resolve(target)
    except griffe.NameResolutionError:
        path = target
    return f'<autoref optional identifier="{path}"><code>{text}</code></autoref>'
