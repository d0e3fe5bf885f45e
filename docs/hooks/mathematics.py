"""Mathematics at build time: `$...$` and blocks of `$$...$$` become MathML, which browsers show without any script.

A block that contains `\\label{name}` is a numbered equation: it gets the anchor `#name`, a number and its name at the margin.
"""

import re
import xml.etree.ElementTree as etree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.util import AtomicString

LABEL = re.compile(r"\\label\{([\w-]+)\}")


class Mathematics(Extension):
    """Adds both notations to Markdown. Numbers start at 1 on every page, because every page has a Markdown of its own."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.parser.blockprocessors.register(_Block(md.parser), "mathematics", 95)  # before paragraphs and headings
        inline = _Inline(r"(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<!\s)\$(?![\w$])", md)
        md.inlinePatterns.register(inline, "mathematics", 185)  # after code spans, before backslash escapes


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element, int, int]:  # type: ignore[override]
        return mathml(m[1], "inline"), m.start(0), m.end(0)


class _Block(BlockProcessor):
    number = 0

    def test(self, parent: etree.Element, block: str) -> bool:
        return block.startswith("$$") and block.rstrip().endswith("$$")

    def run(self, parent: etree.Element, blocks: list[str]) -> None:
        latex = blocks.pop(0).strip().removeprefix("$$").removesuffix("$$").strip()
        name = LABEL.search(latex)
        box = etree.SubElement(parent, "div", {"class": "equation"})
        box.append(mathml(LABEL.sub("", latex), "block"))
        if name:
            self.number += 1
            box.set("id", name[1])
            link = etree.SubElement(box, "a", {"class": "equation-number", "href": f"#{name[1]}"})
            link.text = AtomicString(f"({self.number}) {name[1]}")


def mathml(latex: str, display: str) -> etree.Element:
    """The formula as an element. Raises ValueError for LaTeX that is not understood, with the formula in the message."""
    try:
        text = convert(latex, display=display)
    except Exception as error:
        raise ValueError(f"no MathML can be made of {latex!r}: {error}") from error
    if unknown := re.search(r">(\\[A-Za-z]+)<", text):
        raise ValueError(f"{unknown[1]} in {latex!r} is no command that latex2mathml knows")
    root = etree.fromstring(re.sub(r'\sxmlns="[^"]*"', "", text))
    for element in root.iter():
        if element.text:
            element.text = AtomicString(element.text)
    return root
