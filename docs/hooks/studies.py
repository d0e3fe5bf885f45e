"""A page for every study: what it asks and runs, from its study.yaml, and what came out, from its README, figures and tables."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pages import Page

from mgvq.analysis.report import FIGURES, TABLES, figure_path


@cache
def pages(root: Path) -> list[Page]:
    """The index and a page a study, in the order of their names."""
    files = sorted(root.glob("experiments/*/study.yaml"))
    return [_index(root, files), *(_page(root, file) for file in files)]


def _index(root: Path, files: list[Path]) -> Page:
    rows = ["| study | question | arms | verdict |", "|---|---|---|---|"]
    for file in files:
        study, name = yaml.safe_load(file.read_text(encoding="utf-8")), file.parent.name
        verdict = _first_verdict(root, name)
        rows.append(f"| [{name}]({name}.md) | {_cell(study['question'])} | {len(study['arms'])} | {_cell(verdict)} |")
    text = (
        "# Studies\n\nA study is a claim and the runs that test it: `experiments/NAME/study.yaml`. `mgvq-study` runs what is "
        "missing, `mgvq-report` writes record, tables and figures. All numbers on these pages come from committed records "
        "(`results/records/`), from which a test rebuilds every table and figure to the byte. What was tried and did not work "
        "is in `experiments/LOG.md`. [How to write a study](../tutorials/first_study.md).\n\n"
    )
    return Page("studies/index.md", "Studies", text + "\n".join(rows) + "\n")


def _page(root: Path, file: Path) -> Page:
    study, name = yaml.safe_load(file.read_text(encoding="utf-8")), file.parent.name
    frozen = f"*Frozen: run at commit `{study['frozen']}` and reported from its record alone.*" if "frozen" in study else ""
    # Only the first line of a README is taken for the title: it is the study's name.
    body = (file.parent / "README.md").read_text(encoding="utf-8").split("\n", 1)[1]
    parts = [f"# {name}", frozen, _body(body), "## What is run", _design(study), _figures(root, name), _tables(root, name, body)]
    return Page(f"studies/{name}.md", name, "\n\n".join(parts))


def _body(text: str) -> str:
    """The README of a study as a part of its page: markers of tables out, links to other READMEs turned into links to pages."""
    text = re.sub(r"^<!-- (?:table \w+|end) -->$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\(\.\./(\w+)/README\.md\)", r"](\1.md)", text)
    text = re.sub(r"\]\(\.\./\.\./docs/", "](../", text)
    return re.sub(r"!\[[^]]*\]\(\.\./\.\./results/figures/[^)]*\)", "", text)  # figures come below


def _design(study: dict[str, Any]) -> str:
    grid = "".join(f"* grid, `{key}`: {', '.join(f'`{v}`' for v in values)}\n" for key, values in study.get("grid", {}).items())
    common = "".join(f"`{word}` " for word in study.get("common", []))
    arms = "".join(f"| {_cell(arm)} | {' '.join(f'`{_cell(w)}`' for w in words)} |\n" for arm, words in study["arms"].items())
    planned = study.get("primary")
    plan = f"* planned comparison: {planned['arm']} against the baseline, by {planned['metric']}\n" if planned else ""
    seeds = study["seeds"]
    number = f"{len(seeds)} seeds" if isinstance(seeds, list) else ", ".join(f"{len(v)} seeds at {k}" for k, v in seeds.items())
    shared = f"* all runs: {common}\n" if common else ""
    return f"{shared}{grid}* {number}\n{plan}\n| arm | settings |\n|---|---|\n{arms}"


def _figures(root: Path, name: str) -> str:
    found = [(figure, path) for figure in FIGURES if (path := figure_path(root / "results", name, figure)).is_file()]
    shown = "".join(f"![{name}, {figure.name}](../figures/{path.name})\n\n*{figure.caption}*\n\n" for figure, path in found)
    return f"\n## Figures\n\n{shown}" if found else ""


def _tables(root: Path, name: str, body: str) -> str:
    """The tables that the README does not have already: those against further baselines, say."""
    folder, shown = root / "results" / "tables", set(re.findall(r"<!-- table (\w+) -->", body))
    kinds = [*(table.name for table in TABLES), "verdict"]
    stems = ["_".join(filter(None, (name, kind))) for kind in kinds]
    stems += sorted(f.stem for f in folder.glob(f"{name}_vs_*.md"))
    left = [stem for stem in stems if stem not in shown and (folder / f"{stem}.md").is_file()]
    return "".join(f"\n## Table {stem}\n\n{(folder / f'{stem}.md').read_text(encoding='utf-8')}\n" for stem in left)


def _first_verdict(root: Path, name: str) -> str:
    file = root / "results" / "tables" / f"{name}_verdict.md"
    return (
        file.read_text(encoding="utf-8").splitlines()[0].removeprefix("* ")
        if file.is_file() and file.read_text(encoding="utf-8")
        else "not run here yet"
    )


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|")
