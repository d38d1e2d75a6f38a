"""How a script ends: what the user did wrong is one `error:` line and exit code 2, Ctrl-C is a quiet 130.

if __name__ == "__main__":
    run(main)
"""

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn


class UserError(Exception):
    """Something only the user can mend. The message is one line: what is wrong, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are one `error:` line like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main` and exits: 0 done, 2 the user's error, 130 Ctrl-C. Bugs keep their traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as under some daemons
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
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


def quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python calls for an exception that nobody caught: Ctrl-C leaves no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        os._exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt  # `run` has not begun while a script imports torch, which takes seconds
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's word where there is none; nothing needs it
