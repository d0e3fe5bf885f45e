"""The towers of a vision-language model, found from its module tree and its config: no list of families.

What is looked for is what every model of the pattern has: a module that holds the token embedding (language), a model of its own
whose config is `config.vision_config` (vision), and between them whatever else has weights (projector).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mgvq.errors import UserError
from mgvq.model.classes import is_text_only
from mgvq.model.family import family_of
from mgvq.types import Tower

ORDER: tuple[Tower, ...] = ("vision", "projector", "language")  # in which data flows through the towers


@dataclass(frozen=True)
class Towers:
    """What a model is made of."""

    modules: Mapping[Tower, tuple[str, ...]]  # the names of each tower's modules, the towers in the order of the data

    def of(self, name: str) -> Tower | None:
        """The tower of a module or parameter, the inner one of two that lie in one another; None for the rest (the head)."""
        within: dict[int, Tower] = {
            len(module): tower for tower, names in self.modules.items() for module in names if f"{name}.".startswith(f"{module}.")
        }
        return within[max(within)] if within else None


def find_towers(model: PreTrainedModel) -> Towers:
    """Vision, projector, language; of a language model by itself the last alone.

    The projector may lie beside the vision tower, or in it and behind its blocks (Qwen2-VL). Raises UserError, with the modules
    that were found, for a model that is not of this pattern. `model.family.towers` declares what cannot be found out.
    """
    names = {module: name for name, module in model.named_modules()}
    if (declared := family_of(model.config).towers) is not None:
        if missing := [name for part in declared.values() for name in part if name not in names.values()]:
            raise _unclear(model, f"model.family.towers names {', '.join(missing)}, which it does not have")
        return Towers({tower: tuple(declared[tower]) for tower in ORDER if declared.get(tower)})
    try:
        language = names[model.get_input_embeddings()].rpartition(".")[0]
    except NotImplementedError as error:
        raise _unclear(model, f"where its token embedding is, is not said: {error}") from error
    if is_text_only(model.config):
        return Towers({"language": (language,)})
    config = getattr(model.config, "vision_config", None)
    towers = [n for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and n and type(m.config) is type(config)]
    vision = [n for n in towers if not any(n.startswith(f"{other}.") for other in towers)]
    if len(vision) != 1:
        raise _unclear(
            model, f"one module with the config of the vision tower ({type(config).__name__}) was expected, got {vision}"
        )
    (vision,) = vision
    if f"{vision}.".startswith(f"{language}." if language else ""):
        raise _unclear(model, f"the module that holds the token embedding ({language!r}) holds the vision tower ({vision!r}) too")
    for tower in (vision, language):
        if not block_numbers(model, tower):
            raise _unclear(model, f"{tower} was taken for a tower, and holds no list of blocks")
    head = model.get_output_embeddings()
    taken = {vision, language} | ({names[head]} if head is not None else set())
    beside = list(_beside(model, "", taken))
    if strange := [n for n in beside if any(isinstance(m, PreTrainedModel) for m in model.get_submodule(n).modules())]:
        raise _unclear(model, f"{strange} are models of their own, neither vision ({vision}) nor language ({language}) tower")
    width = model.config.get_text_config(decoder=True).hidden_size
    projector = [n for n in beside or _behind_blocks(model, vision) if _could_project(model.get_submodule(n), width)]
    if not projector or set(beside) - set(projector):
        raise _unclear(model, f"no projector to the language tower's width of {width}: beside the towers lie {beside}")
    return Towers({"vision": (vision,), "projector": tuple(projector), "language": (language,)})


def block_numbers(model: torch.nn.Module, tower: str) -> dict[str, int]:
    """The blocks of a tower by name, numbered through: the entries of its outermost module lists."""
    blocks: dict[str, int] = {}
    for name, module in model.get_submodule(tower).named_modules(prefix=tower):
        if isinstance(module, torch.nn.ModuleList) and not any(name.startswith(f"{b}.") for b in blocks):
            blocks |= {f"{name}.{i}": len(blocks) + i for i in range(len(module))}
    return blocks


def _beside(module: torch.nn.Module, prefix: str, taken: set[str]) -> Iterator[str]:
    """The largest modules with weights that neither are nor hold one of `taken`."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if any(t.startswith(f"{path}.") for t in taken):
            yield from _beside(child, f"{path}.", taken)
        elif path not in taken and any(True for _ in child.parameters()):
            yield path


def _behind_blocks(model: torch.nn.Module, vision: str) -> list[str]:
    """The children of the vision tower that come after the one with its blocks."""
    first = next(iter(block_numbers(model, vision)))
    children = [f"{vision}.{name}" for name, _ in model.get_submodule(vision).named_children()]
    return children[next(i for i, c in enumerate(children) if first.startswith(f"{c}.")) + 1 :]


def _could_project(module: torch.nn.Module, width: int) -> bool:
    """Whether it ends in features of this width: by a linear layer, or a bare matrix (Gemma 3)."""
    outputs = [m.out_features for m in module.modules() if isinstance(m, torch.nn.Linear)]
    return width in (outputs or [p.shape[-1] for p in module.parameters() if p.ndim == 2])


def _unclear(model: PreTrainedModel, why: str) -> UserError:
    inner = model.base_model
    prefix = f"{model.base_model_prefix}." if inner is not model else ""
    children = [(n, m) for n, m in model.named_children() if m is not inner]
    children += [(f"{prefix}{n}", m) for n, m in inner.named_children()]
    tree = "".join(f"\n  {n}: {type(m).__name__}, {sum(p.numel() for p in m.parameters()):,} weights" for n, m in children)
    return UserError(
        f"the towers of {type(model).__name__} are not clear: {why} (mgvq/model/towers.py). Declare "
        f"model.family.towers={{vision:[NAME],projector:[NAME],language:[NAME]}}. Its modules:{tree}"
    )
