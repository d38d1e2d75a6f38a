"""What the command lines of several scripts share: which model, where and how it computes.

add_model(parser)                       # --checkpoint_path, --repo, --revision
add_device(parser)                      # --device, --threads, --backend, --dtype
add_speed(parser)                       # a draft, --compile and so on
path = model_path(parser.parse_args())  # converts what --repo names on its first use
"""

import argparse
from pathlib import Path

from checkpoint import DEMO
from errors import UserError, count
from tp import BACKENDS


def add_model(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    where = "a converted folder, a weight file in one, or ORG/NAME; default: the demo"
    source.add_argument("--checkpoint_path", type=Path, help=where)
    source.add_argument("--repo", metavar="ORG/NAME", help="a model on the Hugging Face hub, converted on first use")
    parser.add_argument("--revision", help="of --repo: a branch, tag or commit; default: its main branch")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=count, help="of the CPU; default: as many as torch takes")


def add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute; auto: a GPU if any")
    add_threads(parser)
    add("--backend", choices=BACKENDS, default="auto", help="how the ranks of a torchrun talk to each other")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored")


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
