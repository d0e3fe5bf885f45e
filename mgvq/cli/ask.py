"""`mgvq-ask`: questions to a quantised model, and to the one that it was made of."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mgvq.cli.checkpoints import checkpoint_folder
from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.utf8 import use_utf8
from mgvq.errors import UserError

EXAMPLES = """\
A model that sees takes an image and a question; a language model takes the question alone:

  mgvq-ask results/runs/ID picture.png "what is left of the red circle ?"
  mgvq-ask results/runs/ID "What is the capital of France?"

Without a question it asks for them, one a line, until an empty line or Ctrl-D. Each is asked by itself: the model remembers
nothing of the ones before. A line @other.png shows another image from then on.

  mgvq-ask results/runs/ID picture.png
  mgvq-ask results/runs/ID picture.png --compare "how many things are there ?"

--compare answers twice: by the quantised model, and by the full-precision one that it was made of, which the run's config.yaml
names (give it with --reference where the checkpoint was copied out of its run). Answers are greedy. The layers stay packed in
memory; --dense decodes them once, which takes more memory, and less time where many tokens are read at once, as of an image.

exit status: 0 answered, 2 a mistake, which is told in one paragraph
"""


def main() -> None:
    """Entry point: prints the answer, or two lines with --compare; exits with 2 for what cannot be read or asked."""
    use_utf8()
    parser = argparse.ArgumentParser(
        prog="mgvq-ask",
        usage="mgvq-ask CHECKPOINT [IMAGE] [QUESTION] [options]",
        description="Ask a quantised model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run that has one")
    parser.add_argument("words", nargs="*", metavar="IMAGE QUESTION", help="an image for a model that sees, and a question")
    parser.add_argument("--compare", action="store_true", help="the full-precision model's answer beside it")
    parser.add_argument("--reference", metavar="MODEL", help="that model: a folder or a hub name that is here; implies --compare")
    parser.add_argument("--dense", action="store_true", help="decode all layers once instead of keeping them packed")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="the longest answer (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the computation")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files that came with the model")
    arguments = parser.parse_intermixed_args()
    with mistakes_told("mgvq-ask"):
        _answer(arguments)


def _answer(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    path = checkpoint_folder(arguments.checkpoint)
    reference = _reference(path, arguments) if arguments.compare or arguments.reference else None

    from mgvq.calibration.images import read_image  # here, with torch: help and bad arguments need none of it
    from mgvq.checkpoint.load import load_processor
    from mgvq.model.ask import ask

    processor = load_processor(path, trust_remote_code=arguments.trust_remote_code)
    sees = hasattr(processor, "image_processor")
    shown, question = _words(arguments.words, sees=sees)
    image = _opened(read_image, shown) if shown else None
    models = _loaded(path, processor, reference, arguments)
    for text in [question] if question else _typed():
        if sees and text.startswith("@"):
            try:
                image = _opened(read_image, text[1:].strip())
            except UserError as error:
                print(error, file=sys.stderr)
            continue
        for name, model, own in models:
            since = time.perf_counter()
            try:
                answer = ask(model, own, text, image, arguments.max_new_tokens)
            except UserError as error:
                if question:
                    raise
                print(error, file=sys.stderr)
                break
            seconds = time.perf_counter() - since
            print(f"{name:16}{answer}   ({seconds:.1f} s)" if len(models) > 1 else answer, flush=True)


def _words(words: list[str], *, sees: bool) -> tuple[str | None, str | None]:
    """Image and question, None where it is not given. Raises UserError for more words, or fewer than the model needs."""
    if sees and 1 <= len(words) <= 2:
        return words[0], words[1] if len(words) == 2 else None
    if not sees and len(words) <= 1:
        return None, words[0] if words else None
    need = "an image, and a question in quotes" if sees else "no image: a question in quotes, or nothing"
    raise UserError(f"this model takes {need}; got {len(words)} words{': ' * bool(words)}{', '.join(map(repr, words))}.")


def _opened(read_image: Callable[[Any], Any], name: str) -> Any:
    from mgvq.checks import told_as

    with told_as(f"{name} cannot be read as an image", "Give a png, jpg or another that Pillow reads."):
        if not Path(name).is_file():  # which raises for a text too long to be a name
            raise UserError(f"{name} is no file: give an image (png, jpg, ...), then the question in quotes.")
        return read_image(Path(name))


def _typed() -> Iterator[str]:
    """The lines that are typed, until an empty one or the end; the prompt goes to a terminal alone."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _reference(path: Path, arguments: argparse.Namespace) -> Any:
    """Where the full-precision model is: what was given, or what the run's config.yaml says."""
    from omegaconf import OmegaConf

    from mgvq.model.source import Source
    from mgvq.runs.build import build

    if arguments.reference:
        return Source(name="reference", path=arguments.reference, revision="main", dtype=arguments.dtype,
                      trust_remote_code=arguments.trust_remote_code)  # fmt: skip
    config = path.parent / "config.yaml"
    if not config.is_file():
        raise UserError(f"--compare looks for the full-precision model in {config}, which is not there: give --reference MODEL.")
    cfg: Any = OmegaConf.load(config)
    cfg.model.dtype = arguments.dtype
    return build(cfg, "model")


def _loaded(path: Path, processor: Any, reference: Any, arguments: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Name, model and processor of those that answer."""
    import torch

    from mgvq.checkpoint.load import load
    from mgvq.model.device import find_device
    from mgvq.model.load import load as load_source

    device = find_device(arguments.device)
    settings: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code, "device": device}
    model = load(path, dtype=getattr(torch, arguments.dtype), packed=not arguments.dense, **settings)
    models: list[tuple[str, Any, Any]] = [("quantised", model, processor)]
    if reference is not None:
        full = load_source(reference, device)
        models.append(("full precision", full.model, full.processor))
    return models


if __name__ == "__main__":
    main()
