"""Faults among the ranks of a torchrun: all end, soon, each with one line that says why, and nothing is left behind.

Most of the time goes into starting processes and into silence, so several faults are played at a time.
"""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import ranks_worker
from ranks_worker import FAULT, torchrun

LONG = ["--prompt", "def f(x):", "--ignore_eos", "--max_new_tokens", "1500"]
PREFILL, DECODE = 3, 41  # see make_fault
SOON = 30  # seconds from the fault to the end
BEGIN = 60  # seconds until all ranks run
AT_PROMPT = b"Ctrl-D ends\n"  # what stderr says before a chat begins


@dataclass
class Fault:
    """What happens to a generate.py of several ranks, and what they say of it."""

    fault: dict = field(default_factory=dict)  # see ranks_worker.main
    args: list[str] = field(default_factory=lambda: LONG)
    ranks: int = 2
    do: Callable = lambda play: None  # besides, from outside
    told_by: list[int] = field(default_factory=lambda: [0, 1])  # ranks that have a line `error: rank R of N: ...`
    culprit: str = ""  # what each of these lines says


@dataclass
class Play:
    """A fault that is being played."""

    launch: ranks_worker.Launch
    folder: object
    ranks: int
    code: int = 0
    out: str = ""
    err: str = ""

    def pids(self):
        """Of the ranks, once they have begun."""
        files = [self.folder / f"{rank}.pid" for rank in range(self.ranks)]
        wait_for(lambda: all(file.exists() and " " in file.read_text() for file in files), BEGIN, "the ranks begin")
        return [int(file.read_text().split()[0]) for file in files]

    def there(self, rank):
        wait_for((self.folder / f"{rank}.there").exists, BEGIN, f"rank {rank} gets to the fault")

    def at_prompt(self):
        """Waits for a chat to begin."""
        stream, text = self.launch.process.stderr, b""
        while not text.endswith(AT_PROMPT) and select.select([stream], [], [], BEGIN)[0]:
            text += os.read(stream.fileno(), 1)
        self.err += text.decode()

    def finish(self):
        begun = time.monotonic()
        try:
            self.code, self.out, err = self.launch.finish(timeout=SOON)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not all ended within {SOON} s; left: {self.launch.processes()}")
        self.err += err
        self.nothing_left(SOON - (time.monotonic() - begun))

    def nothing_left(self, seconds):
        """No process, and the port is free again."""
        wait_for(lambda: not self.launch.processes(), seconds, "the last process ends")
        port = int((self.folder / "0.pid").read_text().split()[1])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torchrun does
            probe.bind(("localhost", port))

    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def wait_for(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# What is done from outside


def let_it_hang(play):
    """Until the others have given it up; then it may run again, since torchrun would kill it only in half a minute."""
    pids = play.pids()
    play.there(1)
    wait_for(lambda: pids[0] not in play.launch.processes(), SOON, "rank 0 ends")
    os.kill(pids[1], signal.SIGCONT)


def kill_torchrun(play):
    play.there(0)
    play.launch.process.kill()


def interrupt(play):
    play.there(0)
    os.kill(play.launch.process.pid, signal.SIGINT)


def interrupt_a_rank(play):
    play.there(1)
    os.kill(play.pids()[1], signal.SIGINT)


SLOW = {"ranks": [0, 1], "at": DECODE, "do": "slow"}
FAULTS = {
    # A rank hangs, dies or fails.
    "hangs": Fault({"ranks": [1], "at": DECODE, "do": "stop"}, do=let_it_hang, culprit=r"\brank 1\b|SIGTERM"),
    "killed while it loads": Fault({"ranks": [1], "at": "load", "do": "kill"}, told_by=[0], culprit=r"\brank 1\b"),
    "killed in a prefill": Fault({"ranks": [1], "at": PREFILL, "do": "kill"}, told_by=[0], culprit=r"\brank 1\b"),
    "rank 0 killed in a decode step": Fault(
        {"ranks": [0], "at": DECODE, "do": "kill"}, told_by=[1], culprit=r"\brank 0\b"
    ),
    "killed, with gloo": Fault(  # the connection to it closes, and main threads get an exception
        {"ranks": [1], "at": DECODE, "do": "kill"}, [*LONG, "--backend", "gloo"], told_by=[0], culprit=r"\brank 1\b"
    ),
    "fails": Fault({"ranks": [1], "at": DECODE, "do": "raise"}, told_by=[0], culprit=rf"\brank 1\b.*fault {FAULT}"),
    # Torchrun ends, or is asked to.
    "torchrun is killed": Fault(SLOW, do=kill_torchrun, culprit="connection"),
    "ctrl-c": Fault(SLOW, do=interrupt, told_by=[]),
    "one rank interrupted": Fault(SLOW, do=interrupt_a_rank, told_by=[]),
    # What users do.
    "other flags": Fault({"ranks": [1], "args": ["--seed", "7"]}, culprit=r"--seed.* 7\b"),
    "another checkpoint": Fault({"ranks": [1], "args": ["--checkpoint_path", "CHAT"]}, culprit="checkpoint"),
    "a prompt file that is missing": Fault({}, ["--prompt_file", "/nonexistent/p"], culprit="/nonexistent/p"),
}


def play_fault(fault, folder, checkpoints):
    """Plays it to the end -> Play, after every check that is the same for all."""
    folder.mkdir()
    own = {"args": [checkpoints.get(arg, arg) for arg in fault.fault["args"]]} if "args" in fault.fault else {}
    spec = {"out": str(folder), "args": ["--checkpoint_path", checkpoints["BASE"], *fault.args]}
    stdin = subprocess.PIPE if "--interactive" in fault.args else subprocess.DEVNULL
    with torchrun(fault.ranks, ranks_worker.__file__, spec | {"fault": fault.fault | own}, stdin=stdin) as launch:
        play = Play(launch, folder, fault.ranks)
        play.pids()
        if "at" in fault.fault:
            play.there(fault.fault["ranks"][0])
        fault.do(play)
        if stdin is subprocess.PIPE:  # it stays open, as a terminal does
            wait_for(lambda: launch.process.poll() is not None, SOON, "torchrun ends")
        play.finish()
    return play


@pytest.fixture(scope="module")
def plays(request, base_folder, chat_folder, tmp_path_factory):
    """name -> a future of the Play, of the faults that are asked for."""
    names = [
        item.callspec.params["name"] for item in request.session.items if item.originalname == test_faults.__name__
    ]
    root = tmp_path_factory.mktemp("faults")
    checkpoints = {"BASE": str(base_folder), "CHAT": str(chat_folder)}
    with ThreadPoolExecutor(3) as pool:
        yield {
            name: pool.submit(play_fault, FAULTS[name], root / str(number), checkpoints)
            for number, name in enumerate(names)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults(plays, name):
    fault, play = FAULTS[name], plays[name].result()
    assert play.code != 0
    told = play.errors()
    starts = [re.match(rf"error: rank (\d+) of {fault.ranks}: ", line) for line in told]
    assert all(starts), told
    assert sorted(int(start[1]) for start in starts) == fault.told_by, play.err
    assert all(re.search(fault.culprit, line[start.end() :]) for line, start in zip(told, starts, strict=True)), told
    if name == "fails":
        assert f"RuntimeError: fault {FAULT}" in play.err  # bugs keep their traceback
    else:
        assert not re.search(r"(generate|engine|lifeline|tp)\.py", play.err), play.err
    if "at" not in fault.fault:
        assert play.out == ""


def test_an_unknown_flag_is_said_before_ranks_meet(base_folder):
    """Of some ranks: torchrun ends the others when one has ended."""
    with torchrun(2, ranks_worker.ROOT / "generate.py", "--unknown", "1") as launch:
        code, out, err = launch.finish(timeout=BEGIN)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and out == "" and told
    assert all(re.match(r"error: rank [01] of 2: .*--unknown", line) for line in told)


def test_a_reader_that_has_seen_enough(base_folder, tmp_path):
    """`| head`: no rank says a word."""
    spec = {"out": str(tmp_path), "args": ["--checkpoint_path", str(base_folder), *LONG], "fault": SLOW}
    with torchrun(2, ranks_worker.__file__, spec) as launch:
        play = Play(launch, tmp_path, 2)
        play.there(0)
        launch.process.stdout.close()
        play.err = launch.process.stderr.read().decode()
        with contextlib.suppress(subprocess.TimeoutExpired):
            play.code = launch.process.wait(SOON)
        play.nothing_left(SOON)
    assert play.code != 0 and play.errors() == [] and "BrokenPipe" not in play.err
