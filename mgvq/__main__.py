"""`python -m mgvq COMMAND ...` is `mgvq-COMMAND ...`, for where the scripts are not on the path."""

import sys
from importlib import import_module

import mgvq

COMMANDS = {
    "run": "quantise one model, save it, load it back, evaluate it",
    "study": "run what a study lacks, then print its table",
    "report": "a study's record, tables and figures",
    "runs": "the runs that there are: list, show, diff, verify, pack, check",
    "ask": "questions to a quantised model, and to the one that it was made of",
    "export": "a checkpoint as a folder that transformers loads without mgvq",
    "sensitivity": "all definitions of channel sensitivity side by side",
}
USAGE = "\n".join(
    ["usage: python -m mgvq COMMAND ...", "", *(f"  {name:12} {what}" for name, what in COMMANDS.items()), "", "  COMMAND --help"]
)


def main() -> None:
    """Entry point: exits with 2 for a command that there is not."""
    name, *words = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"mgvq {mgvq.__version__}")
    elif name in ("--help", "-h"):
        print(USAGE)
    elif name in COMMANDS:
        sys.argv = [f"mgvq-{name}", *words]
        import_module(f"mgvq.cli.{name}").main()
    else:
        print(f"mgvq: there is no command {name}.\n{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
