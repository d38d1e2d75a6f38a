"""What the command lines of several scripts share: which model, how many threads.

add_model(parser)                       # --checkpoint_path, --repo, --revision
add_threads(parser)                     # --threads
path = model_path(parser.parse_args())  # converts what --repo names on its first use
"""

import argparse
from pathlib import Path

from checkpoint import DEMO
from errors import UserError, count


def add_model(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    where = "a converted folder, a weight file in one, or ORG/NAME; default: the demo"
    source.add_argument("--checkpoint_path", type=Path, help=where)
    source.add_argument("--repo", metavar="ORG/NAME", help="a model on the Hugging Face hub, converted on first use")
    parser.add_argument("--revision", help="of --repo: a branch, tag or commit; default: its main branch")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=count, help="of the CPU; default: as many as torch takes")


def model_path(args: argparse.Namespace) -> Path:
    """What checkpoint.weights_path takes: the path that was given, that of the converted repo, or the demo's."""
    if args.revision is not None and args.repo is None:
        raise UserError("--revision needs --repo; add it")
    if args.repo is None:
        return args.checkpoint_path or DEMO
    from convert_hf_checkpoint import fetch_checkpoint  # most runs need no converter

    return fetch_checkpoint(args.repo, args.revision)
