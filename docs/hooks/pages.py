"""What generators give to mkdocs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Page:
    """A generated page."""

    path: str  # below docs/
    title: str  # in the navigation
    text: str  # Markdown
