"""How a script begins and ends: what the user did wrong is one `error:` line and exit code 2, Ctrl-C is a quiet 130.

import errors  # before anything that imports torch

if __name__ == "__main__":
    errors.run(main)
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

SPIN_COUNT = "20000"  # turns of a waiting thread before it sleeps


class UserError(Exception):
    """Something only the user can mend. The message is one line: what is wrong, and what to do about it."""


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of each option with its default, unless that says it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest == "help" or action.required or "default" in text:
            return text
        default = "none" if action.default is None else "off" if action.default is False else "%(default)s"
        return f"{text}; default: {default}" if text else f"default: {default}"


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are one `error:` line like any other and whose help names every default."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def count(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 11 else 0
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a number from 1 to {2**31 - 1}")
    return value


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main` and exits: 0 done, 2 the user's error, 130 Ctrl-C. Bugs keep their traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as under some daemons
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    quiet = signal.getsignal(signal.SIGINT) is end_at_once
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        exit_with(2, str(error))
    except KeyboardInterrupt:
        exit_with(130)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has seen enough. 141 is what a shell reports for SIGPIPE.
        exit_with(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and error.filename is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        advice = "free some space or choose another folder" if full else "check the path and its permissions"
        exit_with(2, f"{where}{error.strerror}; {advice}")
    finally:
        if quiet:  # while the interpreter tidies up
            signal.signal(signal.SIGINT, end_at_once)


def world_size() -> int:
    """How many ranks a torchrun has started; 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def log(message: str) -> None:
    """A line for the user, on stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def exit_with(code: int, message: str = "") -> NoReturn:
    """Ends the script. stdout goes to the null device first: a closed pipe would raise once more at the last flush."""
    ranks = world_size()
    who = f"rank {os.environ['RANK']} of {ranks}: " if ranks > 1 else ""
    with contextlib.suppress(OSError):  # stderr may be full or closed as well
        if message:
            log(f"error: {who}{' '.join(message.split())}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if ranks > 1:
        os._exit(code)  # what the interpreter would tidy up waits for the other ranks
    sys.exit(code)


def end_at_once(*_: object) -> NoReturn:
    """Ctrl-C while a script imports torch, where an exception could be caught by whoever imports something optional."""
    os._exit(130)


def is_main_program() -> bool:
    """Whether the program is a script of this folder or of one in it, and not somebody else's that imports it."""
    folder = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "/"))
    return os.path.dirname(os.path.abspath(__file__)) in (folder, os.path.dirname(folder))


if is_main_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
# A thread of OpenMP that waits for the others spins, by default until they come: beside other work, which keeps one of
# them from its core, decoding fell from 1,000 to 4 tokens/s. It has to be set before torch loads the library.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's word where there is none; nothing needs it
