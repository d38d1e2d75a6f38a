"""How soon generate.py writes and how much memory it takes: the part of bench.py that needs processes of its own.

    folder = write_checkpoint(Path("bench_out/weights/1b-cpu/int4-g32"), hf_config, model)    # what is in no file yet
    measure_startup(folder, rounds=3, device=torch.device("cpu"))              # {"first_s": [...], "cold_s": ...}

A checkpoint that is written for it is kept for the next run.
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
from torch import Tensor, nn

from benchmarks.models import INT4, INT8
from checkpoint import DEMO
from engine import resident_bytes
from errors import UserError, log
from files import check_disk, write_atomically
from kernels import Int4Linear, Int8Linear, unpack_int4, unpack_int8, unpack_scales
from kernels.experts import Int4Experts, Int8Experts
from layout import FORMAT, VERSION, Form
from model import Transformer
from writer import write_safetensors

HERE = Path(__file__).parent.parent
GENERATE = HERE / "generate.py"
MEMORY_PROBE = """
import errors  # first: it keeps a warning of torch's quiet
import re, sys, torch
from pathlib import Path
from checkpoint import load_model
from engine import peak_memory, resident_bytes

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
print(resident_bytes(model), imported, loaded, peak())
"""


def compiled_command(script: Path, folder: Path, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """A script with --compile on this checkpoint, and the environment in which it takes the threads of this process."""
    command = [sys.executable, str(script), "--compile", "--checkpoint_path", str(folder)]
    return [*command, "--device", device.type], {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def write_checkpoint(folder: Path, hf_config: dict[str, Any], model: Transformer) -> Path:
    """Writes the model as a checkpoint, with the demo's tokenizer; one that is in the folder already is kept."""
    if not (folder / "config.json").exists():
        check_disk(resident_bytes(model), folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, quantized = model.state_dict(), {}
        for name, layer in model.named_modules():
            if isinstance(layer, INT8 + INT4):
                quantized[name], parts = canonical(layer)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        metadata = {"format": FORMAT, "version": VERSION, "quantized": json.dumps(quantized)}
        path = folder / "model.safetensors"
        write_safetensors(path, shapes, lambda name: [tensors[name].cpu().contiguous()], metadata)
        for source in DEMO.glob("tokenizer*"):
            (folder / source.name).write_bytes(source.read_bytes())
        with write_atomically(folder / "config.json") as file:  # last: it says that the rest is there
            file.write(json.dumps(hf_config, indent=2).encode())
    return folder


def canonical(
    layer: Int8Linear | Int4Linear | Int8Experts | Int4Experts,
) -> tuple[str, dict[str, Tensor | None]]:
    """What a quantized layer is called in the metadata, and its tensors as they are on disk."""
    form = Form(8 if isinstance(layer, INT8) else 4, layer.groupsize)
    if isinstance(layer, (Int8Experts, Int4Experts)):
        experts = [unpacked(layer, i) for i in range(layer.n_experts)]
        parts, order = [torch.stack(part) for part in zip(*experts, strict=True)], None
    else:
        parts, order = unpacked(layer), layer.order
    return form.name, {**dict(zip(form.parts, parts, strict=True)), "bias": layer.bias, "order": order}


def unpacked(layer: nn.Module, expert: int | None = None) -> tuple[Tensor, ...]:
    """The weight [out, in], the scales and for int4 the zeros of a quantized layer, or of one of its experts."""
    sizes = layer.out_features, layer.in_features
    packed = layer.packed if expert is None else layer.packed[expert]
    if isinstance(layer, INT4):
        return unpack_int4(packed, *sizes, layer.groupsize, layer.scale_dtype, layer.zero)
    scales = layer.scales if expert is None else layer.scales[expert]
    return unpack_int8(packed, *sizes), unpack_scales(scales, layer.out_features) if layer.groupsize else scales


def measure_startup(folder: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """From the start of a process to its first tokens, and the memory that it takes, in seconds and GB.

    The clock runs from the start of `generate.py --compile --max_new_tokens 2 --json` until its line is on stdout: one
    token of the prefill and one of the compiled loop. Each round starts it with nothing built, then with the kernels
    of the CPU and Inductor's header there but nothing compiled (cold), and then with what this left (warm). The weights
    are in the page cache. Memory is the peak of a process that loads them (on the CPU) before, after that, and after a
    forward pass that has touched all of them.
    """
    command, environment = compiled_command(GENERATE, folder, device)
    command += ["--json", "--prompt", "16", "--max_new_tokens", "2"]
    times: dict[str, list[float]] = {"first_s": [], "cold_s": [], "warm_s": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment |= {"TORCH_EXTENSIONS_DIR": f"{cache}/kernels", "TMPDIR": cache}  # the header is in the latter
            for kind, values in times.items():
                if kind != "warm_s":
                    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{kind}"
                begun = time.perf_counter()
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                with subprocess.Popen(command, env=environment, **pipes) as child:
                    line = child.stdout.readline()
                    values.append(time.perf_counter() - begun)
                if not line:
                    raise UserError(f"generate.py fails; see what it says to: {' '.join(command[1:])}")
        first, cold, warm = (values[-1] for values in times.values())
        log(
            f"startup {number + 1} of {rounds}: {first:.1f} s with nothing built, {cold:.1f} s compiled from scratch, "
            f"{warm:.1f} s with a warm cache"
        )
    del environment["TORCH_EXTENSIONS_DIR"], environment["TMPDIR"]
    probe = [sys.executable, "-c", MEMORY_PROBE, str(folder.absolute())]
    output = subprocess.check_output(probe, cwd=HERE, env=environment)
    weights, imported, loaded, used = (int(word) for word in output.split())
    return {
        **times,
        **{key.replace("_s", "_median_s"): statistics.median(values) for key, values in times.items()},
        "weights_gb": weights / 1e9,
        "resident_before_gb": imported / 1e9,
        "resident_loaded_gb": loaded / 1e9,
        "resident_used_gb": used / 1e9,
        "loaded_to_weights": loaded / weights,
        "used_to_weights": used / weights,
    }
