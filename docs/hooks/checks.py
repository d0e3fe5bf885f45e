"""The page of checks: whatever mgvq refuses, when, and what it says, read out of the code that says it."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pages import Page

REFUSALS = {"UserError", "SharedFault"}  # who makes one refuses something
HELPERS = {"whole_number", "told_as"}  # of mgvq/checks.py, which refuse for others
# Functions that put a place, or an advice, around a text that becomes a UserError.
MAKERS = {"error", "refusal", "_not_here", "_unclear", "_unfit"}

# When the checks of a module happen, in the order of a run. The longest name wins; `Class.__post_init__` has a moment of its own.
MOMENTS = {
    "words and values, before torch is imported": (
        "cli", "runs.build", "runs.declared", "runs.device", "runs.method", "runs.objective", "runs.processes",
        "runs.offers", "runs.overrides",
        "quantization.method", "allocation.budget.check_positive", "codebook.sharing", "compensation.damping",
        "curvature.fusion.check_clip", "sensitivity.channels", "data.texts.TextSettings.check_settings",
    ),
    "the names of runs: what settings point to, before torch is imported": ("runs.identity", "model.source"),
    "study files and launchers, before the first run": ("studies",),
    "the results folder and the device, before a run starts": ("runs.files", "runs.execute", "runs.quantise"),
    "the other processes that share a run, whenever they are spoken to": ("ranks",),
    "what `mgvq.quantize` was given, before anything is collected": ("runs.api",),
    "calibration data and questions, before the model is loaded": ("calibration", "evaluation", "data"),
    "the model's files and processor, before its weights are read": (
        "model.files", "model.processor", "model.chat", "model.encode", "model.text", "model.fit", "model.family", "model.gguf",
        "model.internvl2", "runs.method.check_images", "runs.dry",
    ),
    "the shapes of the layers, before anything is collected": ("model.sites", "model.towers", "grouping", "allocation"),
    "weights and logits, when the model is loaded": ("model",),
    "samples and statistics, while they are collected": ("curvature", "model.passes", "model.answers"),
    "layers, while they are quantised": (
        "quantization", "sensitivity", "codebook", "compensation", "refit", "transform", "prefix", "tuning",
    ),
    "checkpoints, whenever one is read": ("checkpoint",),
    "checkpoints, before they are exported": ("export",),
    "finished runs, records and tables, whenever one is read": ("runs.store", "runs.verify", "analysis"),
}  # fmt: skip
BUILT = next(iter(MOMENTS))
_NO_NAMES = ("self", "join", "sorted", "str", "map", "len", "type", "isinstance")  # in an expression that is told by its name
SAYS = """\
# Checks

What mgvq refuses: every refusal that stands in the code, in the order of a run. A refusal is one paragraph without a traceback,
with exit status 2, that names the value, the place (file and line, layer, or setting) and the fix. *Words in italics* stand for
what was found. In a sweep or a study a refusal costs the run that it is about; one that ends in *Every other run would meet this
too* ends the study. What is no reason to refuse, but a table has to say, is a flag: [A run folder](run_folder.md).

This page is generated from the code: it lists every place that raises `UserError`, so it can neither lack one nor have one too
many. What libraries raise on a bad file is told as a sentence of ours with their words in brackets (*its words*).
"""


@dataclass(frozen=True)
class Check:
    """One place that refuses something."""

    module: str  # below mgvq
    scope: str  # the function, with its class
    line: int
    says: str  # with its values in italics


@cache
def pages(root: Path) -> list[Page]:
    """The one page."""
    found = checks(root)
    parts = [SAYS]
    for moment in MOMENTS:
        rows = [check for check in found if moment_of(check) == moment]
        table = "\n".join(f"| {check.says} | `{check.module}.{check.scope}` |" for check in rows)
        parts.append(f"## {moment[0].upper()}{moment[1:]}\n\n| what is said | where |\n|---|---|\n{table}\n")
    return [Page("checks.md", "Checks", "\n".join(parts))]


def checks(root: Path) -> list[Check]:
    """Every place of the package that refuses something, by module and line."""
    files = sorted(f for f in (root / "mgvq").rglob("*.py") if f != root / "mgvq" / "checks.py")  # the helpers themselves
    return [check for file in files for check in _of(file, root / "mgvq")]


def moment_of(check: Check) -> str:
    """When the check happens. Raises KeyError for a module that has no moment: give it one."""
    if check.scope.endswith("__post_init__") and not check.module.startswith("studies"):
        return BUILT
    name = f"{check.module}.{check.scope}"
    fitting = [
        (len(start), moment) for moment, starts in MOMENTS.items() for start in starts if f"{name}.".startswith(f"{start}.")
    ]
    if not fitting:
        raise KeyError(f"docs/hooks/checks.py: MOMENTS has no place for {name}")
    return max(fitting)[1]


def _of(file: Path, package: Path) -> Iterator[Check]:
    module = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    constants = {t.id: a.value for a in tree.body if isinstance(a, ast.Assign) for t in a.targets if isinstance(t, ast.Name)}
    for scope, call in _calls(tree, ()):
        if (says := _said(call, constants)) is not None:
            yield Check(module, ".".join(scope), call.lineno, says)


def _calls(node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        if isinstance(child, ast.Call) and (_name(child) not in MAKERS or isinstance(node, ast.Raise)):
            yield scope, child
        yield from _calls(child, (*scope, child.name) if named else scope)  # type: ignore[attr-defined]


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _said(call: ast.Call, constants: Mapping[str, ast.expr]) -> str | None:
    """The sentence that the call makes; None where it refuses nothing, or hands on what another has said."""
    name = _name(call)
    texts = [_text(argument, constants) for argument in call.args]
    if name in REFUSALS | MAKERS:
        return _cell(texts[-1])
    if name == "told_as":
        return _cell(f"{texts[0]} (*its words*). {texts[1]}")
    if name == "whole_number":
        given = {word.arg: _text(word.value, constants) for word in call.keywords}
        span = f"from {given.get('least', '0')} to {given['most']}" if "most" in given else f">= {given.get('least', '0')}"
        return _cell(f"{texts[0]} must be a whole number {span}, got *value*. {given.get('why', '')}")
    return None


def _text(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """The expression as people read it: texts, and the module's constants, as they are, values as their names in italics."""
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr):
        return _text(constants[node.id], constants)
    if isinstance(node, ast.Constant):
        return _plain(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part.value if isinstance(part, ast.FormattedValue) else part, constants) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    names = [n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if isinstance(n, ast.Attribute | ast.Name)]
    told = [n.strip("_").replace("_", " ") for n in names if n not in _NO_NAMES]
    return f"*{told[0] if told else '...'}*"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _cell(text: str) -> str:
    return " ".join(text.replace("\\\\n", " ").split())
