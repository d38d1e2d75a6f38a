"""Runs everything that needs an NVIDIA GPU: the CUDA tests, the speed of each kernel, bench.py, and several ranks.

    python scripts/gpu_check.py                     # results go to $OUT if that is set, else to gpu_check/
    python scripts/gpu_check.py FOLDER --only tests kernels bench ranks           # some of the four parts

Writes tests.txt, kernels.json (the layers and the attention of the 8b shape, in microseconds and GB/s) and the report
of bench.py. A failure does not stop it; the exit code is then 1. All parts should take about ten minutes, most of them
for compiling, and 40 GB of the GPU's memory.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import errors  # noqa: E402, F401  # first, since torch warns where there is no NumPy

# isort: split
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from kernels import Int4Linear, Int8Linear  # noqa: E402

LAYERS = {"wqkv": (6144, 4096), "wo": (4096, 4096), "w13": (28672, 4096), "w2": (4096, 14336), "output": (128256, 4096)}
ROTATED = 2**29  # bytes of weights that a measurement reads in turn, so that none are still in the L2 cache


def microseconds(calls: list[Callable]) -> float:
    """Time of one call, when all of them run in one CUDA graph: the median of 20 replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[5:])


def linear_layers(mode: str, N: int, K: int) -> list[Callable]:
    """Random layers of N outputs and K inputs, so many that they fill the L2 cache several times."""
    count = max(2, ROTATED // (N * K * {"bf16": 4, "int8": 2, "int4": 1}[mode] // 2))
    if mode == "bf16":
        weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        return [lambda x, weight=weight: F.linear(x, weight) for weight in weights]
    if mode == "int8":
        weights = [torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda") for _ in range(count)]
        return [Int8Linear.from_canonical(weight, torch.rand(N, device="cuda") / 1e4) for weight in weights]
    layers = []
    for _ in range(count):
        q = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(N, K // 32, device="cuda") / 1e3).bfloat16()
        layers.append(Int4Linear.from_canonical(q, scales, torch.full_like(scales, 8), K, 32))
    return layers


def measure_kernels() -> dict[str, list[dict]]:
    results: dict[str, list[dict]] = {"linear": [], "attention": []}
    for (name, (N, K)), mode in itertools.product(LAYERS.items(), ("bf16", "int8", "int4")):
        layers = linear_layers(mode, N, K)
        nbytes = N * K * 2 if mode == "bf16" else layers[0].weight_bytes
        for rows in (1, 2, 4, 8, 16, 64, 512):
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            us = microseconds([lambda layer=layer, x=x: layer(x) for layer in layers])
            results["linear"].append(dict(layer=name, mode=mode, rows=rows, us=us, gb_s=nbytes / us / 1e3))
            print(f"{name} {mode} {rows} rows: {us:.1f} us, {nbytes / us / 1e3:.0f} GB/s", flush=True)
    caches = [torch.randn(2, 1, 8, 8193, 128, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    for queries, position in itertools.product((1, 4), (100, 1000, 4000, 8000)):
        q = torch.randn(1, queries, 32, 128, device="cuda", dtype=torch.bfloat16)
        pos = torch.arange(position, position + queries, device="cuda")[None]
        us = microseconds(
            [lambda c=c, q=q, pos=pos: torch.ops.brisk.decode_attention(q, c[0], c[1], pos) for c in caches]
        )
        nbytes = 2 * 8 * position * 128 * 2
        results["attention"].append(dict(queries=queries, position=position, us=us, gb_s=nbytes / us / 1e3))
        print(f"attention, {queries} queries at {position}: {us:.1f} us, {nbytes / us / 1e3:.0f} GB/s", flush=True)
    return results


def run_tests(folder: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_kernels_cuda.py", "tests/test_experts_cuda.py"]
    tests = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (folder / "tests.txt").write_text(tests.stdout)
    print("\n".join(tests.stdout.splitlines()[-30:]), flush=True)
    return tests.returncode == 0


def run_kernels(folder: Path) -> bool:
    try:
        with torch.inference_mode():
            (folder / "kernels.json").write_text(json.dumps(measure_kernels(), indent=1))
    except Exception as error:
        print(f"kernels: {error!r}", flush=True)
        return False
    torch.cuda.empty_cache()
    return True


def run_bench(folder: Path) -> bool:
    command = [sys.executable, "bench.py", "--shape", "8b", "--device", "cuda", "--mode", "bf16", "int8", "int4"]
    command += ["--positions", "0", "1000", "4000", "8000", "--out", str(folder)]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def run_ranks(folder: Path) -> bool:
    """Tensor parallelism over all GPUs, if there are several: the text must be that of one GPU; runs bench.py."""
    count = torch.cuda.device_count()
    if count < 2:
        print("ranks: skipped, this machine has only one GPU", flush=True)
        return True
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    greedy = ["generate.py", "--compile", "--dtype", "float32", "--temperature", "0", "--prompt", "import os"]
    texts = [
        subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        for command in ([sys.executable, *greedy], [*torchrun, *greedy])
    ]
    bench = ["bench.py", "--shape", "8b", "--device", "cuda", "--mode", "bf16", "int8", "int4", "--out", str(folder)]
    return texts[0] == texts[1] != "" and subprocess.run([*torchrun, *bench], cwd=ROOT).returncode == 0


PARTS = {"tests": run_tests, "kernels": run_kernels, "bench": run_bench, "ranks": run_ranks}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the CUDA tests, time each kernel, run bench.py, and try several ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(os.environ.get("OUT") or "gpu_check"), help="for results"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU was found; run this on a machine that has one", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = [part for part in args.only if not PARTS[part](args.folder.absolute())]
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
