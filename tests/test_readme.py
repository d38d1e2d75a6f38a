"""The command blocks of README.md, benchmarks/README.md and demo/README.md: each runs, and shows what it says.

They run one after the other in a copy of this checkout, with an environment of requirements.txt alone: the README's
first block, `make demo`, makes it. Copy and environment are kept in ~/.cache/gpt-brisk, in a folder named by the hash
of requirements.txt, so that the environment is made once. `make clean` removes them.

A block with lines that begin with `$ ` shows the output of these commands; every other block is one script. Figures of
time, speed and memory may be any; figures with four decimals may differ by a thousandth, as the order of additions has
it; `...` stands for any lines. A block is left out only if `<!-- not run: needs REASON -->` stands right above it.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "benchmarks/README.md", "demo/README.md")
REASONS = ("the hub", "a network", "a GPU", "minutes")
NOT_RUN = re.compile(r"<!-- not run: needs (.+) -->")
VARYING = re.compile(r"\d[\d.,]*(?= (?:s|ms|tok/s|GB/s|GB)\b)")  # a figure of time, speed or memory
PRECISE = re.compile(r"\b\d+\.\d{4}\b")
# As Python's warnings module, glog and torch's C++ print them.
WARNING = re.compile(r"^(\S+:\d+: \w*Warning: |\[?W\d{4} |Warning: |warning: ).*", re.MULTILINE)


@dataclass
class Block:
    page: str
    line: int  # of the page, where the block begins
    language: str
    lines: list[str]
    reason: str | None  # why it is not run

    @property
    def commands(self) -> list[tuple[str, list[str] | None]]:
        """Scripts for bash, or one for Python, each with the lines of output that the page shows."""
        if not any(line.startswith("$ ") for line in self.lines):
            return [("\n".join(self.lines), None)]
        commands: list[tuple[str, list[str] | None]] = []
        for line in self.lines:
            if line.startswith("$ "):
                commands.append((line.removeprefix("$ "), []))
            else:
                commands[-1][1].append(line)
        return commands


def read_blocks(page: str) -> list[Block]:
    blocks: list[Block] = []
    inside, above = False, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if not inside:
                reason = NOT_RUN.fullmatch(above)
                blocks.append(Block(page, number, line.removeprefix("```"), [], reason and reason[1]))
            inside = not inside
        elif inside:
            blocks[-1].lines.append(line)
        above = line
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


@pytest.fixture(scope="module")
def checkout():
    """The copy of this checkout, for as long as no other process uses it."""
    key = hashlib.sha256((ROOT / "requirements.txt").read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "gpt-brisk" / f"readme-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in folder.iterdir():
            if old.name == ".venv":
                continue
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\0"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        yield folder


def environment(checkout: Path, script: str) -> dict[str, str]:
    """A user's environment after `source .venv/bin/activate`, without what pytest or make have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAKE", "MFLAGS"))}
    if "torchrun" in script:
        kept.pop("OMP_NUM_THREADS", None)  # torchrun warns where it is not set
    base = getattr(sys, "_base_executable", sys.executable)  # not the environment of the tests
    path = f"{checkout}/.venv/bin:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHON": base, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def pattern(line: str) -> str:
    """A regular expression for a line of output as the page shows it."""
    line = VARYING.sub("\0", PRECISE.sub("\1", line))
    return re.escape(line).replace("\0", r"\d[\d.,]*").replace("\1", r"(\d+\.\d{4})")


def assert_shown(output: str, shown: list[str]) -> None:
    """What a command printed is what the page shows."""
    wanted = "\n".join(r"(?:.*\n)*?.*" if line == "..." else pattern(line) for line in shown)
    match = re.fullmatch(wanted, output.rstrip("\n"))
    assert match, f"the page shows\n{chr(10).join(shown)}\nand the command printed\n{output}"
    figures = [float(figure) for line in shown for figure in PRECISE.findall(line)]
    assert [float(figure) for figure in match.groups()] == pytest.approx(figures, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.reason is None], ids=lambda block: f"{block.page}:{block.line}"
)
def test_a_block_runs_and_shows_what_it_says(block: Block, checkout: Path):
    for script, shown in block.commands:
        command = ["python", "-c", script] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", script]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        result = subprocess.run(
            command, cwd=checkout, env=environment(checkout, script), text=True, timeout=900, **streams
        )
        output = result.stdout.replace(f"{checkout}/", "")
        assert result.returncode == 0, f"{script}\nended with {result.returncode} and printed\n{output}"
        warned = WARNING.search(output)
        assert not warned, f"{script}\nprinted a warning:\n{warned[0]}"
        if shown is not None:
            assert_shown(output, shown)


def test_blocks_are_left_out_only_for_what_they_need():
    reasons = [block.reason for block in BLOCKS if block.reason is not None]
    assert all(reason.startswith(REASONS) for reason in reasons), reasons
    assert all("<!-- not run" not in line for block in BLOCKS for line in block.lines)
    remarks = sum((ROOT / page).read_text(encoding="utf-8").count("<!-- not run") for page in PAGES)
    assert remarks == len(reasons), "a remark does not stand right above a block"


def test_the_readme_names_every_file_of_the_root():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text]
    assert not missing, f"README.md does not say what these are for: {missing}"


def test_what_a_page_shows_is_compared():
    """Times may differ, texts and other figures may not."""
    shown = ["wrote x: 6.0 MB in 1.2 s", "perplexity 23.4059 over 10 tokens", "...", "end"]
    assert_shown("wrote x: 6.0 MB in 30.5 s\nperplexity 23.4060 over 10 tokens\na\nb\nend\n", shown)
    for wrong in ("wrote x: 6.1 MB in 1.2 s", "wrote y: 6.0 MB in 1.2 s", "wrote x: 6.0 MB in s"):
        with pytest.raises(AssertionError):
            assert_shown(f"{wrong}\nperplexity 23.4059 over 10 tokens\nend\n", shown)
    with pytest.raises(AssertionError):
        assert_shown("perplexity 23.5059", ["perplexity 23.4059"])


@pytest.mark.parametrize(
    "line",
    [
        "/a/b.py:84: UserWarning: Failed to initialize NumPy: No module named 'numpy' (Triggered internally at x.cpp)",
        "[W1128 04:00:00.123456789 socket.cpp:755] [c10d] The client socket has failed to connect",
        "W1128 04:00:00.123000 4242 torch/distributed/run.py:874] Setting OMP_NUM_THREADS environment variable",
        "warning: the CPU kernels could not be built",
    ],
)
def test_a_warning_is_seen(line: str):
    assert WARNING.search(f"loaded\n{line}\n") and not WARNING.search("    raise DeprecationWarning: Warning\n")
