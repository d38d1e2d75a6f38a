"""How soon generate.py speaks and how much memory it takes: the part of bench.py that needs processes of its own.

    folder = write_checkpoint(Path("bench_out/weights"), hf_config, model)     # for a model that is made up
    measure_startup(folder, rounds=3, device=torch.device("cpu"))              # {"cold_s": [...], "warm_s": [...], ...}

A file that generate.py has to find is written once and kept for the next run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench_peers import fingerprint
from checkpoint import DEMO, FORMAT, VERSION, check_disk, write_atomically, write_safetensors
from errors import UserError
from generate import log
from model import Transformer

HERE = Path(__file__).parent
MEMORY_PROBE = """
import re, sys, torch
from pathlib import Path
from checkpoint import load_model
from engine import peak_memory

def peak():
    # ru_maxrss starts with what the parent had, on Linux
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]) * 1024
    return peak_memory(torch.device("cpu"))

imported = peak()
model = load_model(sys.argv[1])
loaded = peak()
model.setup_caches(1, 128)
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
print(sum(p.nbytes for p in model.parameters()), imported, loaded, peak())
"""


def write_checkpoint(folder: Path, hf_config: dict[str, Any], model: Transformer) -> Path:
    """The model as a checkpoint in `folder`, with the demo's tokenizer; one that is there already is kept."""
    folder = folder / fingerprint(model)
    if not (folder / "config.json").exists():
        state = model.state_dict()
        check_disk(sum(tensor.nbytes for tensor in state.values()), folder)
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        metadata = {"format": FORMAT, "version": VERSION}
        write_safetensors(folder / "model.safetensors", shapes, lambda name: [state[name].cpu()], metadata)
        for source in DEMO.glob("tokenizer*"):
            (folder / source.name).write_bytes(source.read_bytes())
        with write_atomically(folder / "config.json") as file:  # last: it says that the rest is there
            file.write(json.dumps(hf_config, indent=2).encode())
    return folder


def measure_startup(folder: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """From the start of a process to its first tokens, and the memory that it takes, in seconds and GB.

    The clock runs from the start of `generate.py --compile --max_new_tokens 2 --json` until its line is on stdout: one
    token of the prefill and one of the compiled loop. Each round runs it with an empty Inductor cache and then with
    the one this left. The weights are in the page cache. Memory is the peak of a process that loads them (on the CPU)
    before, after that, and after a forward pass that has touched all of them.
    """
    command = [sys.executable, str(HERE / "generate.py"), "--compile", "--checkpoint_path", str(folder), "--json"]
    command += ["--prompt", "16", "--max_new_tokens", "2", "--device", device.type]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    times: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment["TORCHINDUCTOR_CACHE_DIR"] = cache
            for values in times.values():
                begun = time.perf_counter()
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                with subprocess.Popen(command, env=environment, **pipes) as child:
                    line = child.stdout.readline()
                    values.append(time.perf_counter() - begun)
                if not line:
                    raise UserError(f"generate.py fails; see what it says to: {' '.join(command[1:])}")
        cold, warm = times["cold_s"][-1], times["warm_s"][-1]
        log(f"startup {number + 1} of {rounds}: {cold:.1f} s compiled from scratch, {warm:.1f} s with a warm cache")
    probe = [sys.executable, "-c", MEMORY_PROBE, str(folder)]
    output = subprocess.check_output(probe, cwd=HERE, env=environment)
    weights, imported, loaded, used = (int(word) for word in output.split())
    return {
        **times,
        "cold_median_s": statistics.median(times["cold_s"]),
        "warm_median_s": statistics.median(times["warm_s"]),
        "weights_gb": weights / 1e9,
        "resident_before_gb": imported / 1e9,
        "resident_loaded_gb": loaded / 1e9,
        "resident_used_gb": used / 1e9,
        "loaded_to_weights": loaded / weights,
        "used_to_weights": used / weights,
    }
