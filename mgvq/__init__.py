"""Vector quantisation of vision-language models, as controlled and seeded experiments."""

from typing import TYPE_CHECKING, Any

from mgvq.checkpoint.hook import register

if TYPE_CHECKING:
    from mgvq.checkpoint.load import load, load_processor

    __version__: str

__all__ = ["__version__", "load", "load_processor"]


def __getattr__(name: str) -> Any:
    """`mgvq.load`, `mgvq.load_processor`, `mgvq.__version__` on first use: importing the package stays free of torch."""
    if name in ("load", "load_processor"):
        from mgvq.checkpoint import load as reading

        return getattr(reading, name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module 'mgvq' has no attribute {name!r}")


def _version() -> str:
    """The version of the installed package; in a checkout that is not installed, the one of its pyproject.toml."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("mgvq")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] if project.is_file() else "unknown"


register()
