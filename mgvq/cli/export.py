"""`mgvq-export`: a checkpoint as a folder that transformers loads without mgvq."""

import argparse
from pathlib import Path

from mgvq.cli.checkpoints import checkpoint_folder
from mgvq.cli.mistakes import mistakes_told
from mgvq.cli.utf8 import use_utf8

KINDS = """\
kinds:
  bf16    all weights decoded and rounded once to 16 bits: any checkpoint, no size saved, every program reads it
  aqlm    AQLM's codes, without loss: codebook=kmeans, residual or additive, no transform, groups or outliers, one rate for all
          layers, input channels a multiple of the vector length. Length 8 with two tables of 256 is AQLM's 2 x 8, which has
          fast kernels. To load it: pip install --no-deps aqlm
  vptq    VPTQ's codes, without loss: codebook=columns, no transform, groups or outliers. transformers loads these on a GPU only.
          To load it: pip install --no-deps vptq (and what it then asks for)

A layer that a kind cannot hold is named with the reason, and nothing is written. Codes load exactly as they are in float32,
which config.json asks for where 16 bits do not hold all numbers; dtype=torch.float16 is what the fast kernels want.

  mgvq-run model=tiny_internvl codebook=residual codebook.vector_length=8
  mgvq-export results/runs/ID --to aqlm --out for_aqlm
  mgvq-export results/runs/ID --to bf16
  python -c "from transformers import AutoModelForImageTextToText as A; A.from_pretrained('checkpoint-bf16')"
"""


def main() -> None:
    """Entry point: prints the folder that was written; exits with 2 where the checkpoint cannot be read or represented."""
    use_utf8()
    parser = argparse.ArgumentParser(
        prog="mgvq-export",
        description="Write a checkpoint as a folder that transformers loads without mgvq.",
        epilog=KINDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or the folder of a run that has one")
    parser.add_argument("--to", required=True, choices=("bf16", "aqlm", "vptq"), help="what is written")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: NAME-KIND in the working directory)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files that came with the model")
    arguments = parser.parse_args()
    with mistakes_told("mgvq-export"):
        from mgvq.export.folder import export  # here, with torch: help and bad arguments need none of it
        from mgvq.runs.files import disk_faults_told

        path = checkpoint_folder(arguments.checkpoint)
        out = arguments.out or Path(f"{path.absolute().name}-{arguments.to}")
        with disk_faults_told(out):
            done = export(path, out, arguments.to, trust_remote_code=arguments.trust_remote_code)
    what = f"codes of {done.num_coded} layers" if done.num_coded else "plain weights"
    print(f"{done.folder}: {what}, {done.num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
