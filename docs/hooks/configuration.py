"""A page for every configuration group, from the yaml files of conf/: their comments are the descriptions."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pages import Page

# In the order of a run; the protocol that the variants of a group meet, where there is one.
GROUPS = {
    "method": None,
    "model": None,
    "calibration": "Calibration",
    "curvature": "Curvature",
    "sensitivity": "Sensitivity",
    "grouping": "Grouping",
    "allocation": "Allocation",
    "codebook": "Codebook",
    "compensation": "Compensation",
    "refit": "Refit",
    "transform": "Transform",
    "prefix": "Prefix",
    "tuning": "Tuning",
    "evaluation": "Task",
    "tracker": None,
    "experiment": None,
    "paths": None,
}
SAYS = {
    "method": "Presets: a published method, or one of ours, as overrides of the groups below, each at 2.0 stored bits a weight "
    "without further settings. A peer's preset names its source, its settings and every deviation.",
    "model": "The model that is quantised. What a `shape` says is only counted with, before anything is downloaded.",
    "experiment": "Presets of a whole run.",
    "paths": "Where results go.",
    "tracker": "Mirrors of a run's metrics beside its folder, which is the truth.",
}


@dataclass
class Setting:
    """One line of a yaml."""

    name: str  # dotted
    default: str
    says: list[str] = field(default_factory=list)


@dataclass
class Variant:
    """One yaml of a group."""

    name: str
    headline: list[str]  # the comment lines at its top
    starts_from: list[str]
    overrides: list[str]
    target: str | None
    settings: list[Setting]


@cache
def pages(root: Path) -> list[Page]:
    """The index and a page a group."""
    folders = {f.parent.name for f in (root / "conf").glob("*/*.yaml")} - {"hydra"}
    groups = [*(g for g in GROUPS if g in folders), *sorted(folders - set(GROUPS))]
    return [_index(root, groups), *(Page(f"configuration/{g}.md", g, _group(root, g)) for g in groups)]


def _index(root: Path, groups: list[str]) -> Page:
    rows = ["| group | variants |", "|---|---|"]
    for group in groups:
        names = [f.stem for f in sorted((root / "conf" / group).glob("*.yaml"))]
        rows.append(f"| [{group}]({group}.md) | {', '.join(f'[`{name}`]({group}.md#{name})' for name in names)} |")
    settings = [s for s in read(root / "conf" / "config.yaml").settings if not s.name.startswith(("hydra", "defaults"))]
    text = (
        "# Configuration\n\nA run is a choice of one variant from each group, and a value for every setting: "
        "`mgvq-run GROUP=VARIANT KEY=VALUE`. These pages are generated from `conf/` at every build: a variant is one yaml and "
        "one class, the comments in the yaml are the descriptions here. Presets (`method`, `experiment`) win over the groups, "
        "and the command line wins over all. `mgvq-run method=kmeans --cfg job --resolve` prints a run's settings and runs "
        "nothing. A setting that has no effect is an error.\n\n"
    )
    return Page(
        "configuration/index.md", "Configuration", text + "\n".join(rows) + "\n\n## Settings of every run\n\n" + _table(settings)
    )


def _group(root: Path, group: str) -> str:
    protocol = GROUPS.get(group)
    contract = f"\n\nEvery variant meets [`{protocol}`][mgvq.protocols.{protocol}]." if protocol else ""
    variants = [read(f) for f in sorted((root / "conf" / group).glob("*.yaml"))]
    return f"# {group}\n\n{_says(root, group)}{contract}\n\n" + "\n".join(_variant(root, group, v) for v in variants)


def _says(root: Path, group: str) -> str:
    """What the group is for: the docstring of its package, which a reader of the code sees too."""
    init = root / "mgvq" / group / "__init__.py"
    if group in SAYS or not init.is_file():
        return SAYS.get(group, "")
    return ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""


def _variant(root: Path, group: str, variant: Variant) -> str:
    parts = [f"## {variant.name} {{#{variant.name}}}", f"`mgvq-run {group}={variant.name}`", _headline(variant.headline)]
    if variant.starts_from:
        parts.append("Starts from " + ", ".join(f"[`{name}`](#{name})" for name in variant.starts_from) + ".")
    if variant.overrides:
        parts.append(
            "Chooses " + ", ".join(f"[`{g}={v}`]({g}.md#{v})" for g, v in (o.split("=") for o in variant.overrides)) + "."
        )
    if variant.settings:
        parts.append(_table(variant.settings))
    if variant.target and (doc := docstring(root, variant.target)):
        parts.append(f'??? note "`{variant.target}`"\n\n' + "\n".join(f"    {line}".rstrip() for line in doc.splitlines()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(lines: list[str]) -> str:
    """Paragraphs of the comment: `Settings:`, `Deviations:`, `Chosen:` and `Fine-tuning:` begin one each."""
    return re.sub(r"\n(?=[A-Z][\w-]+: )", "\n\n", "\n".join(lines))


def _table(settings: list[Setting]) -> str:
    rows = [f"| `{s.name}` | {f'`{_cell(s.default)}`' if s.default else ''} | {_cell(' '.join(s.says))} |" for s in settings]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def docstring(root: Path, target: str) -> str:
    """The docstring of the class that a yaml names, and the texts under its fields, read without importing it.

    Empty for a class of another package.
    """
    module, _, name = target.rpartition(".")
    file = root / (module.replace(".", "/") + ".py")
    if not file.is_file():
        return ""
    nodes = (
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    node = next(nodes, None)
    return "" if node is None else "\n\n".join([ast.get_docstring(node) or "", "\n".join(_fields(node))]).strip()


def _fields(node: ast.ClassDef) -> Iterator[str]:
    for pair in pairwise(node.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield f"* `{name}`: {' '.join(text.split())}"


def read(file: Path) -> Variant:
    """A yaml with its comments: those at the top are the headline, others say what the setting in or below their line is."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    lines = file.read_text(encoding="utf-8").splitlines()
    top = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    headline = [line.removeprefix("#").strip() for line in lines[:top] if "@package" not in line]
    starts_from, overrides = [], []
    for entry in content.get("defaults", []) if file.stem != "config" else []:
        if isinstance(entry, dict):
            overrides += [f"{key.split('/')[-1]}={value}" for key, value in entry.items()]
        elif entry != "_self_":
            starts_from.append(entry.partition("@")[0])  # what stands in a field of it is another variant too
    settings = [s for s in _settings(lines[top:]) if not any(part.startswith("_") for part in s.name.split("."))]
    settings = [s for s in settings if s.name.split(".")[0] != "defaults"]
    return Variant(file.stem, headline, starts_from, overrides, content.get("_target_"), settings)


def _settings(lines: list[str]) -> list[Setting]:
    found: list[Setting] = []
    above: list[tuple[int, str]] = []  # indent and name of the mappings that hold the present line
    waiting: list[str] = []  # comments before a key
    for line in lines:
        code, comment = _split(line)
        indent = len(line) - len(line.lstrip())
        key = re.match(r"\s*([\w.-]+):(?:\s+(.*))?$", code)
        if not code.strip():
            if comment and indent > 12 and found:
                found[-1].says.append(comment)  # goes on from the line above
            elif comment:
                waiting.append(comment)
        elif key is None:
            if found:  # the rest of a value, or an entry of a list
                found[-1].default = f"{found[-1].default} {code.strip()}".strip()
        else:
            above = [(i, name) for i, name in above if i < indent]
            name = ".".join([*(n for _, n in above), key[1]])
            value = (key[2] or "").strip()
            if not value:
                above.append((indent, key[1]))
            found.append(Setting(name, value, [*waiting, *([comment] if comment else [])]))
            waiting = []
    parents = {s.name.rpartition(".")[0] for s in found}
    return [s for s in found if s.default or s.says or s.name not in parents]


def _split(line: str) -> tuple[str, str]:
    """Code and comment of a line; a hash sign inside quotes is none."""
    quoted = False
    for place, sign in enumerate(line):
        if sign in "\"'":
            quoted = not quoted
        if sign == "#" and not quoted and (place == 0 or line[place - 1] in " \t"):
            return line[:place].rstrip(), line[place + 1 :].strip()
    return line.rstrip(), ""
