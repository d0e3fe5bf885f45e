"""Vector quantisation of vision-language models, as controlled and seeded experiments."""

from typing import TYPE_CHECKING, Any

from mgvq.checkpoint.hook import register

if TYPE_CHECKING:
    from mgvq.analysis.records.records import read_record as read_study
    from mgvq.checkpoint.load import load, load_processor
    from mgvq.runs.api import quantize

    __version__: str

__all__ = ["__version__", "load", "load_processor", "quantize", "read_study"]

_PLACES = {  # of what is public, by the name that it has here: module and name
    "load": ("mgvq.checkpoint.load", "load"),
    "load_processor": ("mgvq.checkpoint.load", "load_processor"),
    "quantize": ("mgvq.runs.api", "quantize"),
    "read_study": ("mgvq.analysis.records.records", "read_record"),
}


def __getattr__(name: str) -> Any:
    """What `__all__` names, on first use: importing the package stays free of torch."""
    if name in _PLACES:
        from importlib import import_module

        module, own = _PLACES[name]
        return getattr(import_module(module), own)
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
