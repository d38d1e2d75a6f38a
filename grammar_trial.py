"""Whether llguidance compiles a grammar within bounds. Some overflow its stack, or take it minutes and gigabytes,
whatever limits it is given, and would take the process along: so each is compiled in another process first.

    trial = Trial(vocab_size, special)  # starts a process that waits for grammars
    if not trial.compiles(source):
        raise UserError("... takes too much time or memory to compile; simplify it")

That process forks for each grammar, and what happens to the fork is the answer. It imports no torch: this file is run
as a script there. A trial takes a few milliseconds more than the grammar itself.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from types import ModuleType

# What compiling and a mask may cost, in llguidance's units; its errors need not quote the text.
LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}
# What compiling and the first mask may cost the fork: of the processor, of memory, of a stack of 8 MB.
SECONDS, BYTES, STACK_BYTES = 2, 1 << 30, 6 << 20


class Trial:
    """The process for grammars of one vocabulary: `size` tokens, of which the special ones have names that a grammar
    may mention, by id. Threads may share it."""

    def __init__(self, size: int, special: dict[int, str]):
        self._vocabulary = [size, list(special.items())]
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        folder = os.path.dirname(importlib.util.find_spec("llguidance").origin)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where a fork may panic
            start_new_session=True,  # Ctrl-C is not for it
        )
        weakref.finalize(self, self._process.communicate)
        self._send(self._vocabulary)

    def _send(self, value: object) -> None:
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def compiles(self, source: str) -> bool:
        """RuntimeError if the process ends meanwhile; the next call starts another."""
        with self._lock:
            if self._process.poll() is not None:
                self._start()
            try:
                self._send(source)
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = b""
        if answer not in (b"yes\n", b"no\n"):
            raise RuntimeError(f"the process that tries grammars has ended with {self._process.wait()}")
        return answer == b"yes\n"


class TokenSource:
    """What LLTokenizer asks for: the bytes of each token, and which are special."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokens: list[bytes], eos_token_id: int, special_token_ids: list[int]):
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, eos_token_id, special_token_ids

    def __call__(self, text: str) -> list[int]:
        """Only asked where a grammar forces tokens, which grammar.py turns off."""
        raise NotImplementedError(text)


def main() -> None:
    """Answers each grammar, a JSON string a line, after a line with the vocabulary."""
    # The package itself would import much that is not needed here.
    package = sys.modules["llguidance"] = ModuleType("llguidance")
    package.__path__ = [sys.argv[1]]
    from llguidance._lib import LLMatcher, LLParserLimits, LLTokenizer

    size, special = json.loads(sys.stdin.buffer.readline())
    tokens = [b""] * size + [bytes([byte]) for byte in range(256)] + [b""]  # single bytes spell every text
    for token_id, name in special:
        tokens[token_id] = name.encode()
    end = size + 256
    tokenizer = LLTokenizer(TokenSource(tokens, end, [*(token_id for token_id, _ in special), end]), slices=[])

    def try_out(source: str) -> None:
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()

    try_out("start: /a/")  # the first one in a process takes longer
    for line in iter(sys.stdin.buffer.readline, b""):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                set_bounds()
                try_out(json.loads(line))
                status = 0
            finally:  # whatever was raised: no memory, a panic in the library
                os._exit(status)
        survived = os.waitpid(pid, 0)[1] == 0
        sys.stdout.buffer.write(b"yes\n" if survived else b"no\n")
        sys.stdout.buffer.flush()


def set_bounds() -> None:
    """Limits what this process may use."""
    import resource  # not on Windows

    signal.alarm(30 * SECONDS)  # the machine may be busy
    for name, bound in ("CORE", 0), ("CPU", SECONDS), ("AS", BYTES), ("STACK", STACK_BYTES):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


if __name__ == "__main__":
    main()
