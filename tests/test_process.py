"""generate.py as a process: a bare environment, signals, closed streams, pipes, terminals, a missing compiler."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Result, assert_refused, converse

import errors
import generate

SCRIPT = Path(generate.__file__).resolve()


def start(*args, shell=None, env=None, **others):
    """`python generate.py ARGS...`; `shell` redirects, as in '<&-'."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    if shell:
        command = ["sh", "-c", f'exec "$0" "$@" {shell}', *command]
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    env = {"OMP_NUM_THREADS": "1"} | (dict(os.environ) if env is None else env)
    return subprocess.Popen(command, env=env, **(streams | others))


def finish(process):
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return Result(process.returncode, out.decode(), err.decode())


# As a process: signals, closed streams, terminals


def quick(folder, *more):
    return ("--checkpoint_path", folder, "--prompt", "def f(x):", "--max_new_tokens", 12, *more)


def test_process_with_a_bare_environment(base_folder, script):
    """From another folder, by a relative path, without HOME, in the C locale, on a dumb terminal."""
    env = {"LC_ALL": "C", "TERM": "dumb", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"}
    args = quick(base_folder.name, "--temperature", 1, "--seed", 5)
    result = finish(start(*args, cwd=base_folder.parent, env=env))
    assert result.code == 0, result.err
    assert result.out == script(*quick(base_folder, "--temperature", 1, "--seed", 5)).out
    assert len(result.err.splitlines()) == 2


def test_process_refuses_what_is_not_utf8(base_folder):
    result = finish(start("--checkpoint_path", base_folder, "--prompt", b"ab\xff".decode(errors="surrogateescape")))
    assert_refused(result, "UTF-8")


def test_interrupted_while_it_generates(base_folder):
    process = start("--checkpoint_path", base_folder, "--prompt", "def", "--max_new_tokens", 2000)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.code == 130
    assert "Traceback" not in result.err and len(result.err.splitlines()) <= 1


def test_interrupted_while_it_imports(base_folder):
    """Importing torch takes a second or more, and that is when people notice a typing error."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), *map(str, quick(base_folder))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stderr:
        if b"torch." in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    said = [line for line in err.decode().splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, said) == (130, b"", [])


SCRIPTS = {
    "generate.py": ("--prompt", "def", "--max_new_tokens", "900"),
    "eval.py": ("--perplexity", "demo/heldout.txt"),
    "quantize.py": ("--mode", "int4-gptq", "--checkpoint_path", "{folder}"),
    "convert_hf_checkpoint.py": ("--checkpoint_dir", "{folder}"),
    "scripts/grow_checkpoint.py": ("--out", "{folder}/../grown"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_soon_after_the_start(base_folder, name):
    """From the first line of a script on, whatever it imports, Ctrl-C ends it without a word."""
    args = [argument.format(folder=base_folder) for argument in SCRIPTS[name]]
    for seconds in (0.0, 0.05, 0.2, 0.5):
        program = f"""
import os, runpy, signal, sys, threading
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = sys.argv[1:]
sys.modules["__main__"].__file__ = sys.argv[0]
import errors
threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT)).start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        command = [sys.executable, "-c", program, str(SCRIPT.parent / name), *args]
        process = subprocess.run(command, capture_output=True, timeout=240, cwd=SCRIPT.parent)
        said = [line for line in process.stderr.decode().splitlines() if "Traceback" in line or "rror" in line]
        assert (process.returncode, said) == (130, []), (seconds, process.stderr.decode())


def test_waiting_threads_sleep_after_a_while():
    """OpenMP is told so before torch loads it, unless the user said something else."""
    show = "import os, errors; print(os.environ.get('GOMP_SPINCOUNT'))"
    base = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ways = {errors.SPIN_COUNT: {}, "7": {"GOMP_SPINCOUNT": "7"}, "None": {"OMP_WAIT_POLICY": "active"}}
    for expected, given in ways.items():
        command = [sys.executable, "-c", show]
        done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parent, env=base | given)
        assert done.stdout.strip() == expected


def test_a_reader_that_has_seen_enough(base_folder):
    process = start("--checkpoint_path", base_folder, "--prompt", "10", "--max_new_tokens", 2000)
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 141
    assert "Traceback" not in err and "Exception" not in err and "error" not in err


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk(base_folder):
    result = finish(start(*quick(base_folder), shell=">/dev/full"))
    assert result.code == 2 and "Traceback" not in result.err
    assert re.search(r"^error: .*No space left on device", result.err, re.MULTILINE)


@pytest.mark.parametrize("args", [("--interactive",), ("--prompt_file", "-")], ids=" ".join)
def test_closed_stdin(base_folder, args):
    result = finish(start("--checkpoint_path", base_folder, *args, shell="<&-"))
    assert "Traceback" not in result.err and result.out == ""
    assert result.code == (0 if args == ("--interactive",) else 2)


def test_closed_stdout(base_folder):
    result = finish(start(*quick(base_folder), shell=">&-"))
    assert "Traceback" not in result.err and result.code in (0, 2)


def test_closed_stderr(base_folder, script):
    result = finish(start(*quick(base_folder), shell="2>&-"))
    assert (result.code, result.out) == (0, script(*quick(base_folder)).out)


class Terminal:
    """generate.py --interactive at a pseudo-terminal."""

    def __init__(self, folder, term):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            args = ["--checkpoint_path", str(folder), "--interactive", "--max_new_tokens", "5"]
            os.environ |= {"TERM": term, "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [sys.executable, str(SCRIPT), *args])

    def read_until(self, end, seconds=240):
        text = b""
        while not text.endswith(end) and select.select([self.fd], [], [], seconds)[0]:
            try:
                text += os.read(self.fd, 4096)
            except OSError:  # the other side is closed
                break
        return text.decode(errors="replace").replace("\r\n", "\n")

    def type(self, data):
        os.write(self.fd, data)

    def exit_code(self, seconds=60):
        """The exit code; None where it still runs after `seconds`."""
        for _ in range(round(seconds / 0.1)):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)


@pytest.fixture
def terminal(chat_folder, request):
    terminal = Terminal(chat_folder, getattr(request, "param", "dumb"))
    yield terminal
    if terminal.pid:  # the test has failed
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)
    os.close(terminal.fd)


def test_at_a_terminal(terminal, chat_folder, script):
    reply = converse(script, chat_folder, "hello", args=("--max_new_tokens", 5)).out
    assert "/clear" in terminal.read_until(b"> ")
    terminal.type(b"hello\n")
    echo, speed = "hello\n" + reply, r"prefill [^\n]+\ncut off after 5 tokens; /set max_new_tokens [^\n]+\n> "
    assert re.fullmatch(re.escape(echo) + speed, terminal.read_until(b"\n> "))
    terminal.type(b"\x04")  # Ctrl-D
    assert "Traceback" not in terminal.read_until(b"nothing") and terminal.exit_code() == 0


@pytest.mark.parametrize("terminal", ["xterm"], indirect=True)
def test_ctrl_c_ends_a_reply(terminal):
    """And not the chat; what was pasted is one message, though it has two lines."""
    terminal.read_until(b"> ")
    terminal.type(b"/set max_new_tokens 1900\n/set ignore_eos true\n")
    terminal.read_until(b"true\r\n\x1b[?2004l\r\x1b[?2004h> ")
    terminal.type(b"\x1b[200~hello\rand more\x1b[201~\n")
    terminal.read_until(b"\x1b[?2004l\r")  # the message has been taken
    time.sleep(0.3)
    terminal.type(b"\x03")
    said = terminal.read_until(b"conversation\r\n", seconds=20)
    assert "interrupted; what was said stays in the conversation" in said and "Traceback" not in said
    terminal.type(b"/exit\n")
    assert "Traceback" not in terminal.read_until(b"nothing") and terminal.exit_code() == 0


def test_ctrl_c_at_a_terminal(terminal):
    terminal.read_until(b"> ")
    for _ in range(5):  # input() loses a signal that comes just before it waits: a user types it again
        terminal.type(b"\x03")
        assert "Traceback" not in terminal.read_until(b"nothing", seconds=2)
        if (code := terminal.exit_code(seconds=5)) is not None:
            break
    assert code == 130


def test_compile_without_a_compiler(base_folder, tmp_path):
    """One line that says what is missing, or text all the same."""
    env = dict(os.environ) | {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = finish(start(*quick(base_folder, "--compile"), env=env))
    assert "Traceback" not in result.err and "compiler" in result.err
    assert result.code == 2 if not result.out else result.code == 0
