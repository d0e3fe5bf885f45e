"""Vector quantisation of vision-language models, as controlled and seeded experiments."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgvq.checkpoint.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`mgvq.load` on first use: importing the package stays free of torch."""
    if name == "load":
        from mgvq.checkpoint.load import load

        return load
    raise AttributeError(f"module 'mgvq' has no attribute {name!r}")
