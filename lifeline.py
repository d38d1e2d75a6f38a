"""All ranks of a torchrun end when one has failed, each with one `error:` line that says which and why.

    with Lifeline(store, rank, size):
        ...

A thread writes a heartbeat of its rank into the store, twice a second, and reads those of the others. So it notices a
rank that died, was stopped or failed, whatever the main thread is waiting for: mostly a collective that will never end.
(A rank whose main thread hangs while its process goes on is noticed only by the timeout of a collective.)

Ctrl-C ends all ranks without a message. SIGTERM, which torchrun hands on to all of them, ends them with one, unless the
script has set a handler of its own: then it is the script's to end. But torchrun also sends it when a rank has failed,
and then all end in any case.
"""

import os
import select
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

from errors import UserError

PERIOD = 0.5  # seconds between two heartbeats
START = 120.0  # seconds, at most, between the start of the first rank and of the last
SILENCE = 15.0  # seconds without a heartbeat after which a rank counts as dead;
SUSPICION = 3.0  # this many when something is wrong: a connection was closed, torchrun ends everything
FAILED, ENDED, INTERRUPTED = "failed: ", "ended", "interrupted"  # written instead of a heartbeat
GRACE = 2.0  # seconds in which the main thread may end by Ctrl-C itself, unless it is in a collective


class Lifeline:
    """While the context lasts this rank watches the others. `store`: a torch.distributed.Store with a connection of its
    own, since the main thread may block another for minutes."""

    def __init__(self, store: Any, rank: int, size: int):
        self.store, self.rank, self.others = store, rank, [other for other in range(size) if other != rank]
        self.size, self.beat = size, 0
        # What each of the others wrote last, and when this rank first read it.
        self.state: dict[int, tuple[str, float]] = dict.fromkeys(self.others, ("", time.monotonic()))
        self.leaving = threading.Lock()  # the thread that holds it ends this rank
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Lifeline":
        # Signals wake the thread, since the main one may be in a collective. Ctrl-C also interrupts that as usual.
        self.awake, self.signals = socket.socketpair()
        for end in (self.awake, self.signals):
            end.setblocking(False)
        signal.set_wakeup_fd(self.signals.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._look()
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        reason = self.find_culprit() if isinstance(error, RuntimeError) else ""
        self.leaving.acquire()
        self.stopped.set()
        self.signals.send(b"\0")  # wakes the thread
        self.thread.join()
        if error is None:
            self._tell(ENDED)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        elif isinstance(error, Exception) and not isinstance(error, BrokenPipeError):
            self._tell(FAILED + (reason or f"rank {self.rank} failed: {str(error) or type(error).__name__}"))
        else:
            self._tell(INTERRUPTED)
        if reason:
            here = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{reason} (here: {here})") from error

    def find_culprit(self) -> str:
        """Why something went wrong: another rank's reason, or which rank is silent; "" if neither is known."""
        end = time.monotonic() + SUSPICION + 4 * PERIOD
        while time.monotonic() < end and not self.stopped.is_set():
            if reason := self._look(SUSPICION, SUSPICION):
                return reason
            time.sleep(PERIOD / 4)
        return ""

    def _on_sigterm(self, *_: object) -> None:
        """Nothing: the thread is woken all the same."""

    def _watch(self) -> None:
        while not self.stopped.is_set():
            if select.select([self.awake], [], [], PERIOD)[0]:
                received = self.awake.recv(64)
                if signal.SIGINT in received:
                    time.sleep(GRACE)
                    self._end(130)
                if signal.SIGTERM in received:
                    reason = self.find_culprit()
                    if reason or signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                        self._end(1, reason or "was told to end (SIGTERM)")
            if reason := self._look():
                self._end(1, reason)

    def _look(self, silence: float = SILENCE, unseen: float = START) -> str:
        """Writes a heartbeat and reads those of the others -> what is wrong, or "".

        A rank counts as dead after `silence` seconds without one, or after `unseen` seconds before its first.
        """
        self.beat += 1
        if not self._tell(str(self.beat)):
            return "lost the connection to the others"
        now = time.monotonic()
        for other in self.others:
            try:
                text = self.store.get(f"alive/{other}").decode() if self.store.check([f"alive/{other}"]) else ""
            except dist.DistError:
                return "lost the connection to the others"
            if self.state[other][0] != text:
                self.state[other] = text, now
            if text.startswith(FAILED):
                return text.removeprefix(FAILED)
            if text == INTERRUPTED:
                self._end(130)
            if text != ENDED and now - self.state[other][1] > (silence if text else unseen):
                return f"rank {other} has died or was stopped"
        return ""

    def _tell(self, text: str) -> bool:
        try:
            self.store.set(f"alive/{self.rank}", text)
        except dist.DistError:
            return False
        return True

    def _end(self, code: int, reason: str = "") -> None:
        """Ends this rank, unless the main thread is about to."""
        if not self.leaving.acquire(blocking=False):
            return
        self._tell(FAILED + reason if reason else INTERRUPTED)
        if reason:
            os.write(2, f"error: rank {self.rank} of {self.size}: {reason}\n".encode())
        os._exit(code)
