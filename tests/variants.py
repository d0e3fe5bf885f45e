"""The variants of every group as the yamls of conf/ have them, so that a new one is tested by existing.

`SETTINGS` has the sets of settings that a variant is tested under, where that of its yaml is not enough.
"""

import functools
from typing import Any

from conftest import ROOT
from omegaconf import OmegaConf

from mgvq.runs.build import build

CONF = ROOT / "conf"
_SHARED = ("share=kind", "table=int8")
_CALIBRATION = ROOT / "tests" / "data" / "calibration"
_FEW_SAMPLES = ("num_samples=3", "heldout_samples=1")
SETTINGS: dict[str, dict[str, list[tuple[str, ...]]]] = {
    "codebook": {
        "scalar": [("group_size=64",), ("group_size=null", "clip=mse"), ("group_size=5", "clip=mse")],
        "grid": [("group_size=null", "scale_bits=2"), ("group_size=64", "scale_bits=1"), ("weighted=true",), ("group_size=5",)],
        "scaled_grid": [("group_size=8", "scale_bits=3", "num_exponents=3")],
        "kmeans": [
            ("vector_length=1",),
            ("share=input",),
            ("vector_length=[2,4]", "sample=4"),
            ("vector_length=4", *_SHARED),
            ("vector_length=3", "weight_power=0.5"),
            ("vector_length=4", "seeds=mahalanobis", "sample=null"),
        ],
        "product": [("num_tables=3",), ("vector_length=4", *_SHARED)],
        "residual": [(), ("vector_length=3", *_SHARED)],
        "additive": [("num_tables=3", "vector_length=6"), (*_SHARED, "beam=2")],
        "columns": [("residual=true", "vector_length=4"), (), (*_SHARED, "weight_power=1.0")],
    },
    "allocation": {
        "uniform": [("spread=true", "tolerance=0.0")],
        "threshold": [(), ("thresholds=[0.4]", "steps=[0.0,1.0]", "within=layer")],
        "ratio": [(), ("within=model",), ("of=channels",)],
        "greedy": [("distortion=measured",)],
        "exact": [("distortion=measured",)],
    },
    "curvature": {
        "input": [(), ("fusion=mbq_ratio",), ("fusion=mbq_squared",)],
        "guided": [(), ("num_groups=1",)],
        "kronecker": [
            (),
            ("fusion=none",),
            ("fusion=mbq_ratio",),
            ("fusion=token",),
            ("granularity=sequence", "fusion=none"),
        ],
    },
    "sensitivity": {"global_local": [(), ("reading=split", "alpha=null")]},
    "transform": {"hadamard": [("sides=in",), ("sides=out",), (), ("sides=in", "within=group"), ("within=group",)]},
    "compensation": {"gradient_hessian": [(), ("output_damping=0.3",)]},
}
# What a yaml leaves open (`???`), or what keeps small tests short, for all sets of settings of a variant.
ALWAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "codebook": {name: ("iterations=3",) for name in ("additive", "columns", "kmeans", "product", "residual")},
    "allocation": {"transfer": (f"source={ROOT / 'tests/config/allocation.parquet'}",)},
    "calibration": {
        "chat": (f"path={_CALIBRATION / 'chat.jsonl'}", *_FEW_SAMPLES),
        "hub": (f"path={_CALIBRATION / 'hub'}", "columns.images=image", "columns.answer=label", *_FEW_SAMPLES),
        "image_text": (f"path={_CALIBRATION / 'image_text.jsonl'}", *_FEW_SAMPLES),
        "sharegpt4v": (f"path={_CALIBRATION / 'sharegpt4v.json'}", f"images={_CALIBRATION / 'coco'}", *_FEW_SAMPLES),
        "text": _FEW_SAMPLES,
        "tiny_vqa": ("num_images=3", "questions_per_image=2", "heldout_images=1"),
    },
}


@functools.cache
def built(group: str, name: str, *settings: str) -> Any:
    """A variant with some of its settings changed, such as `iterations=3`; without all of Hydra, in a tenth of the time."""
    always = ALWAYS.get(group, {}).get(name, ())
    own = OmegaConf.merge(OmegaConf.load(CONF / group / f"{name}.yaml"), OmegaConf.from_dotlist([*always, *settings]))
    return build(OmegaConf.create({"seed": 0, group: own}), group)


def variants(group: str) -> list[str]:
    """The names of the group's yamls that have something to build."""
    files = sorted((CONF / group).glob("*.yaml"))
    return [file.stem for file in files if OmegaConf.load(file).get("_target_") is not None]


def everyone(group: str) -> dict[str, Any]:
    """Every variant of the group under each of its sets of settings, by a name for people."""
    sets = {name: SETTINGS.get(group, {}).get(name, [()]) for name in variants(group)}
    return {" ".join((name, *one)): built(group, name, *one) for name, several in sets.items() for one in several}


def each(group: str) -> dict[str, Any]:
    """Every variant of the group once, by name: under the last of its sets of settings."""
    return {name: built(group, name, *SETTINGS.get(group, {}).get(name, [()])[-1]) for name in variants(group)}
