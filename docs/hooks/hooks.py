"""What mkdocs does not do by itself: mathematics, pages from conf/ and experiments/, tables of results/, no outside address."""

import ast
import re
from pathlib import Path
from typing import Any

import checks
import configuration
import peers
import studies
from mathematics import Mathematics
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Addresses that the theme's script would ask if a page had a diagram or a repository: no page has, and now none can.
OUTSIDE = re.compile(r"https?://(?:unpkg\.com|api\.github\.com|gitlab\.com)[^\s\"'`$]*")


def root_of(config: MkDocsConfig) -> Path:
    """The root of the repository."""
    return Path(config.config_file_path).parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The notation for mathematics, and the generated pages' places in the navigation."""
    config.markdown_extensions.append(Mathematics())  # type: ignore[arg-type]
    generated = {"Configuration": configuration.pages(root_of(config)), "Studies": studies.pages(root_of(config))}
    for entry in config.nav or []:
        for title, pages in generated.items():
            if title in entry:
                entry[title] = [*entry[title], *({page.title: page.path} for page in pages if not page.path.endswith("index.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The generated pages, and the figures of results/."""
    root = root_of(config)
    for page in [*checks.pages(root), *configuration.pages(root), *peers.pages(root), *studies.pages(root)]:
        files.append(File.generated(config, page.path, content=page.text))
    for figure in sorted((root / "results" / "figures").glob("*.*")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Includes, and links from `eq. (name)` to the equation.

    A line `<!-- table NAME -->` becomes results/tables/NAME.md, a line `<!-- source FILE FUNCTION -->` that function.
    """
    root = root_of(config)

    def table(match: re.Match[str]) -> str:
        return "\n" + (root / "results" / "tables" / f"{match[1]}.md").read_text(encoding="utf-8") + "\n"

    def source(match: re.Match[str]) -> str:
        text = (root / match[1]).read_text(encoding="utf-8")
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        return next(ast.get_source_segment(text, node) or "" for node in nodes if node.name == match[2])

    markdown = re.sub(r"^<!-- table (\w+) -->$", table, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^<!-- source (\S+) (\w+) -->$", source, markdown, flags=re.MULTILINE)
    return _linked(markdown, "../" * page.file.src_uri.count("/") + "method.md" if page.file.src_uri != "method.md" else "")


def _linked(markdown: str, method: str) -> str:
    """Every `eq. (name)` outside of code as a link, to the page's own equation where it has that label, else to the method."""
    own = set(re.findall(r"\\label\{([\w-]+)\}", markdown))

    def link(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0]
        return f"[eq. ({match['name']})]({'' if match['name'] in own else method}#{match['name']})"

    kept = r"^```.*?^```|`[^`\n]+`|\[eq\. \([\w-]+\)\]"
    return re.sub(rf"{kept}|(?:docs/method\.md, )?eq\. \((?P<name>[\w-]+)\)", link, markdown, flags=re.MULTILINE | re.DOTALL)


def on_post_build(config: MkDocsConfig) -> None:
    """Take out of the theme's scripts what they could load from elsewhere."""
    for script in Path(config.site_dir).rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        if (clean := OUTSIDE.sub("", text)) != text:
            script.write_text(clean, encoding="utf-8")
    for source_map in Path(config.site_dir).rglob("*.map"):
        source_map.unlink()
