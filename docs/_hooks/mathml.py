"""Turns the formulas that arithmatex marks into MathML, which browsers show without a script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, /, **kwargs: Any) -> str:
    """Replace every formula of a rendered page."""
    content = _BLOCK.sub(lambda match: convert(html.unescape(match[1]), display="block"), content)
    return _INLINE.sub(lambda match: convert(html.unescape(match[1])), content)
