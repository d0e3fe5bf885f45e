"""Vector quantisation of vision-language models, as controlled and seeded experiments."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgvq.checkpoint.load import load, load_processor

__all__ = ["load", "load_processor"]


def __getattr__(name: str) -> Any:
    """`mgvq.load` and `mgvq.load_processor` on first use: importing the package stays free of torch."""
    if name in __all__:
        from mgvq.checkpoint import load as reading

        return getattr(reading, name)
    raise AttributeError(f"module 'mgvq' has no attribute {name!r}")
