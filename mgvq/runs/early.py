"""The checks of values before torch is imported, which takes longer than any of them.

A variant checks its settings where it is built, and its module imports torch for the rest of what it does. Here the modules are
executed a second time, apart from those of the process, with a `Blank` in place of every library that is not imported yet: a
check that looks at settings alone runs as it stands, and what needs a library is left for when the run is built in earnest.
"""

import builtins
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from mgvq.errors import UserError
from mgvq.runs.fields import wrong_type

log = logging.getLogger(__name__)
_SHARED = ("mgvq.errors",)  # what is raised here is caught outside
_LIGHT = ("platformdirs",)  # imported as they are: of no weight, and asked for folders while modules are executed


def check_values(cfg: DictConfig) -> None:
    """Raises the UserError of the first variant of a run, or of the method that they make, that refuses its settings.

    Once torch is imported there is nothing to gain, and nothing is done: the run is built in a moment.
    """
    if "torch" not in sys.modules:
        with _left_for_later():
            _modules_of(cfg).load("mgvq.runs.method").build_method(cfg)
        for group in ("evaluation", "model", "calibration", "tracker"):
            check_group(cfg, group)


def check_group(cfg: DictConfig, group: str) -> None:
    """The same for the variant of one group, whatever the others are."""
    if "torch" not in sys.modules:
        with _left_for_later():
            _modules_of(cfg).load("mgvq.runs.build").build(cfg, group)


def _modules_of(cfg: DictConfig) -> "_Modules":
    return _modules(frozenset(target.partition(".")[0] for target in _targets(cfg)) | {"mgvq"})


def _targets(settings: Any) -> list[str]:
    """The paths of all classes that the settings name."""
    if not isinstance(settings, Mapping):
        return []
    own = [settings["_target_"]] if settings.get("_target_") else []
    return [*own, *(target for value in settings.values() for target in _targets(value))]


@contextmanager
def _left_for_later() -> Iterator[None]:
    """Only a UserError leaves the block: what else goes wrong without libraries shows when the run is built in earnest."""
    try:
        yield
    except UserError:
        raise
    except (Exception, Undecided) as error:
        log.debug("left for later: %r", error)


class Undecided(BaseException):
    """A check that cannot be made here: it looks at what a library would give. No `except Exception` takes it for an answer."""


def _undecided(*_: Any) -> Any:
    raise Undecided


class Blank:
    """What stands for a library and for all that comes from it. It may be named, called, subscripted and derived from; who wants
    to know anything about it is told `Undecided`."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __call__(self, *_: Any, **__: Any) -> "Blank":
        return Blank()

    def __getattr__(self, name: str) -> "Blank":
        if name.startswith("__"):
            raise AttributeError(name)
        return Blank()

    __getitem__ = __or__ = __ror__ = __call__
    __hash__ = object.__hash__
    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __iter__ = __contains__ = _undecided
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __neg__ = _undecided
    __int__ = __float__ = __index__ = __format__ = __fspath__ = __enter__ = __instancecheck__ = _undecided
    __str__ = _undecided  # type: ignore[assignment]


@functools.cache
def _modules(packages: frozenset[str]) -> "_Modules":
    return _Modules(packages)


class _Modules:
    """The modules of some packages, executed apart from `sys.modules`: they see each other and the standard library."""

    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages
        self._loaded: dict[str, ModuleType] = {name: sys.modules[name] for name in _SHARED}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def load(self, name: str) -> ModuleType:
        """The module of that name; raises ModuleNotFoundError, and whatever executing it raises."""
        if name in self._loaded:
            return self._loaded[name]
        parent, _, last = name.rpartition(".")
        above = self.load(parent) if parent else None
        spec = PathFinder.find_spec(name, above.__path__ if above else None) or (
            None if above else importlib.util.find_spec(name)
        )
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(name)
        module = self._loaded[name] = importlib.util.module_from_spec(spec)
        vars(module)["__builtins__"] = self._builtins
        try:
            exec(spec.loader.get_code(name), vars(module))  # type: ignore[attr-defined]
        except BaseException:
            del self._loaded[name]
            raise
        if above:
            setattr(above, last, module)
        return module

    def instantiate(self, settings: Mapping[str, Any], **_: Any) -> Any:
        """As Hydra's, with classes of these modules; what only Hydra's knows, as `_partial_`, is left for later."""
        values = {k: self._instantiated(v) for k, v in settings.items() if k != "_target_"}
        if any(k.startswith("_") for k in values):
            raise Undecided
        kind = self.get_object(settings["_target_"])
        try:
            return kind(**values)
        except Exception as error:
            if isinstance(error, UserError) or wrong_type(kind, values) is None:
                raise
            raise InstantiationException(str(error)) from error

    def get_object(self, path: str) -> Any:
        """As Hydra's, from these modules."""
        module, _, name = path.rpartition(".")
        return getattr(self.load(module), name)

    def _instantiated(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._instantiated(v) for v in value]
        return self.instantiate(value) if isinstance(value, Mapping) and value.get("_target_") else value

    def _import(
        self, name: str, scope: Mapping[str, Any] | None = None, _: Any = None, names: Sequence[str] | None = (), level: int = 0
    ) -> Any:
        """In place of `__import__` inside the modules."""
        if level and scope:
            name = importlib.util.resolve_name("." * level + name, scope["__package__"])
        top = name.partition(".")[0]
        if name == "hydra.utils":
            return SimpleNamespace(instantiate=self.instantiate, get_object=self.get_object)
        if top not in self._packages:
            known = top in sys.stdlib_module_names or top in _LIGHT or name in sys.modules
            return builtins.__import__(name, scope, None, names or (), 0) if known else Blank()
        module = self.load(name)
        for item in names or ():
            if not hasattr(module, item):
                self.load(f"{name}.{item}")
        return module if names else self.load(top)
