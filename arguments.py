"""What the command lines of several scripts share: which model and adapters, where and how it computes.

add_model(parser)                       # --checkpoint_path, --repo, --revision
add_adapters(parser, "--adapter", ...)  # --adapter, --adapter_scale
add_device(parser)                      # --device, --threads, --backend, --dtype, --cache_dtype
add_speed(parser)                       # a draft, --compile and so on
path = model_path(parser.parse_args())  # converts what --repo names on its first use
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import DEMO
from errors import UserError, count
from tp import BACKENDS


def add_model(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    where = "a converted folder, a weight file in one, or ORG/NAME; default: the demo"
    source.add_argument("--checkpoint_path", type=Path, help=where)
    source.add_argument("--repo", metavar="ORG/NAME", help="a model on the Hugging Face hub, converted on first use")
    parser.add_argument("--revision", help="of --repo: a branch, tag or commit; default: its main branch")


def add_adapters(parser: argparse.ArgumentParser, flag: str, form: str, more: str) -> None:
    """`flag` takes several adapters, each of this form."""
    parser.add_argument(
        flag, dest="adapters", nargs="+", action="extend", default=[], metavar=form,
        help=f"LoRA adapters that PEFT has written, folders or ORG/NAME; {more}; default: none",
    )  # fmt: skip
    parser.add_argument(
        "--adapter_scale", type=factor, default=1.0, metavar="S", help="how much they count; default: 1"
    )


def factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e6:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number such as 0.5")
    return value


def named_adapters(specs: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """What --adapter says, [NAME=]PATH ... -> the paths by their names, and the name of the one that was given none:
    its folder's. UserError for names that are empty, or the same."""
    paths: dict[str, str] = {}
    default = None
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or "/" in name or Path(spec).exists():
            name, path = Path(spec).resolve().name if Path(spec).exists() else Path(spec).name, spec
            if default is not None:
                raise UserError(f"of several adapters one may be without a name; write NAME={spec}")
            default = name
        if not name or not path or ":" in name:
            raise UserError(f"{spec[:80]!r} is not NAME=PATH, with a name that has no colon; correct it")
        if name in paths:
            raise UserError(f"two adapters are called {name!r}; write OTHER={path}")
        paths[name] = path
    return paths, default


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=count, help="of the CPU; default: as many as torch takes")


def add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute; auto: a GPU if any")
    add_threads(parser)
    add("--backend", choices=BACKENDS, default="auto", help="how the ranks of a torchrun talk to each other")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored")
    add_cache_dtype(parser)


def add_cache_dtype(parser: argparse.ArgumentParser) -> None:
    meaning = "of the KV cache; int8: half the memory of bfloat16; default: that of the model"
    parser.add_argument("--cache_dtype", choices=("int8",), help=meaning)


def dtype_named(name: str | None) -> torch.dtype | None:
    """What --dtype and --cache_dtype say; None where they were left out."""
    return None if name is None else getattr(torch, name)


def add_speed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--draft_checkpoint_path", type=Path, help="a small model of the same family that proposes tokens")
    add("--prompt_lookup", action="store_true", help="propose what followed earlier in the text; goes with a draft")
    add("--speculate_k", type=count_or_auto, metavar="K", help="propose so many tokens a step; default: auto")
    add("--compile", action="store_true", help="compile the decode steps")
    add("--compile_prefill", action="store_true", help="compile the prefill as well")


def count_or_auto(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is neither a number nor auto")
    return None if text == "auto" else int(text)


def model_path(args: argparse.Namespace) -> Path:
    """What checkpoint.weights_path takes: the path that was given, that of the converted repo, or the demo's."""
    if args.revision is not None and args.repo is None:
        raise UserError("--revision needs --repo; add it")
    if args.repo is None:
        return args.checkpoint_path or DEMO
    from convert_hf_checkpoint import fetch_checkpoint  # most runs need no converter

    return fetch_checkpoint(args.repo, args.revision)
