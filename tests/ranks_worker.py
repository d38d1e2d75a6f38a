"""Ranks for test_tp.py and test_lifeline.py: `torchrun` starts a torchrun of scripts, of this one among them.

    process = torchrun(2, ranks_worker.py, {"out": FOLDER, "tasks": [...]})              # does them, all in one group
    process = torchrun(2, ranks_worker.py, {"out": FOLDER, "args": [...], "fault": {}})  # generate.py, and a fault

Each rank writes FOLDER/RANK.json, what its tasks returned, when they are done; and at its start FOLDER/RANK.pid.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch

import errors
import generate
import kernels
import tp
from checkpoint import load_config, load_model

ROOT = Path(generate.__file__).resolve().parent
FAULT = 97  # what a rank says that fails on purpose


# ---------------------------------------------------------------------------------------------------------------------
# On the tests' side


class Launch:
    """A torchrun of `ranks` processes and all that it leaves behind; `with` ends what is left."""

    def __init__(self, ranks, script, *args, nodes=None, stdin=subprocess.DEVNULL, env=None):
        """`script` is a path, `args` are strings or JSON; `nodes` (of, port): one of several torchruns."""
        self.mark = uuid.uuid4().hex
        where = ["--standalone"]
        if nodes is not None:
            of, port = nodes
            rendezvous = f"--rdzv_backend=c10d --rdzv_endpoint=localhost:{port} --rdzv_id=test --local_addr=127.0.0.1"
            where = [f"--nnodes={of}", *rendezvous.split()]
        args = [json.dumps(arg) if isinstance(arg, dict) else str(arg) for arg in args]
        command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc_per_node={ranks}", str(script)]
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "BRISK_TEST_MARK": self.mark}
        self.process = subprocess.Popen(
            [*command, *args],
            env=dict(os.environ) | more | (env or {}),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def processes(self):
        """The processes that it started, by a mark in their environment, whoever their parent is."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.mark.encode() in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
        return found

    def finish(self, stdin=None, timeout=120):
        """Waits -> exit code, stdout, stderr."""
        out, err = self.process.communicate(stdin, timeout)
        return self.process.returncode, out.decode(), err.decode()


def torchrun(*args, **others):
    return Launch(*args, **others)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_tasks(ranks, out, tasks, **others):
    """What each rank's tasks returned: [rank][task]."""
    with torchrun(ranks, __file__, {"out": str(out), "tasks": tasks}, **others) as launch:
        code, _, err = launch.finish(timeout=240)
        assert code == 0, err
        return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: each rank calls them with its group


def cli(group, args):
    """What generate.py prints, without joining once more."""
    sys.argv = ["generate.py", *args]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        generate.run(generate.parse_args(), group)
    return text.getvalue()


def logits(group, path, ids, dtype, file):
    """Saves those of the ids of each row, [B, S, V]: all but the last 6 in one prefill, then one by one."""
    model = load_model(path, dtype=getattr(torch, dtype), group=group)
    tokens = torch.tensor(ids)
    B, S = tokens.shape
    positions = torch.arange(S).expand(B, -1)
    model.setup_caches(B, S)
    with torch.inference_mode():
        steps = zip(*(x.split([S - 6] + [1] * 6, 1) for x in (tokens, positions)), strict=True)
        parts = [model(part, at) for part, at in steps]
        hidden = model.hidden(tokens, positions)
        (value, token), (largest, index) = model.max_logit(hidden), model.logits(hidden).max(-1)
    result = torch.cat(parts, 1)
    if group.rank == 0:
        torch.save(result, file)
    return [digest(result), torch.equal(value, largest), torch.equal(token, index)]


def layers(group, path):
    """The largest difference between a quantized layer in slices and whole, as a share of what it computes."""
    config = load_config(path if os.path.isdir(path) else os.path.dirname(path))
    whole, model = (load_model(path, dtype=torch.float32, group=each) for each in (tp.ALONE, group))
    quantized = (kernels.Int4Linear, kernels.Int8Linear)
    quantized = {name: layer for name, layer in whole.named_modules() if isinstance(layer, quantized)}
    slices = group.slices(config, {name: getattr(layer, "groupsize", 0) for name, layer in quantized.items()})
    widths = {"wo": model.config.n_heads * config.head_dim, "w2": model.config.ffn_dim}
    found = {}
    for name, layer in quantized.items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(len(found)))
        expected = layer(x)
        if width := widths.get(name.rpartition(".")[2]):
            x = torch.nn.functional.pad(x, (0, group.size * width - x.shape[1]))
            own = model.get_submodule(name)(x.chunk(group.size, -1)[group.rank])
        else:  # a rank has some of the outputs
            own = model.get_submodule(name)(x)
            expected = torch.stack([slices.slice(f"{name}.bias", row) for row in expected])
        found[name] = ((own - expected).abs().max() / expected.std()).item()
    return found


def sums(group, dtype, sizes):
    """A hash of the sums of random numbers, and the largest error as a share of what float arithmetic allows."""
    dtype, hashes, worst = getattr(torch, dtype), [], 0.0
    precise, single = torch.finfo(dtype), torch.finfo(torch.float32)
    for size in sizes:
        inputs = [torch.randn(size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(group.size)]
        mine = inputs[group.rank].clone()
        result = group.all_reduce(mine)
        assert torch.equal(mine, inputs[group.rank]) and result.shape == (size,) and result.dtype == dtype
        exact, absolute = (sum(f(x.double()) for x in inputs) for f in (lambda x: x, torch.Tensor.abs))
        # Summed up in float32, then rounded once.
        allowed = (group.size - 1) * single.eps / 2 * absolute * 1.01
        if dtype != torch.float32:
            allowed += precise.eps / 2 * (exact.abs() + allowed) + precise.smallest_normal * precise.eps / 2
        allowed += single.smallest_normal
        worst = max(worst, ((result.double() - exact).abs() / allowed).max().item())
        hashes.append(digest(result))
    return [hashes, worst]


def many_sums(group, count):
    """Sums of small whole numbers, which are exact, of all sizes and dtypes, while each rank dawdles now and then."""
    draw, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100 + group.rank)
    right = 0
    for call in range(count):
        big = call % 25 == 0
        size = int(torch.randint(1, 400_000 if big else 3000, (), generator=draw))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[call % 3]
        inputs = torch.randint(-20, 20, (group.size, size), generator=draw).to(dtype)
        if torch.rand((), generator=own) < 0.2:
            time.sleep(0.004 * torch.rand((), generator=own).item())
        right += torch.equal(group.all_reduce(inputs[group.rank]), inputs.sum(0))
    return right


def odd_sums(group):
    """What is no number, a view, nothing, more than float16 holds, and what is refused."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([1.0, inf, nan, -inf]) if group.rank == 0 else torch.ones(4)
    numbers = [str(value) for value in group.all_reduce(values).tolist()]
    x = torch.arange(24.0).view(4, 6)
    view = torch.equal(group.all_reduce(x.T), x.T * group.size)
    empty = [*group.all_reduce(torch.empty(0, 4)).shape]
    half = str(group.all_reduce(torch.full((1,), 60000.0, dtype=torch.float16)).item())
    refused = []
    for bad in (x.double(), x.long(), x.T):
        try:
            torch.ops.brisk.all_reduce(bad)
        except RuntimeError as error:
            refused.append(str(error))
    return [numbers, view, empty, half, refused]


def told(group):
    """What from_rank_0 and check_same make of results, of errors and of settings that differ; and whether the store
    keeps their messages."""
    results = [group.from_rank_0(lambda: {"rank": group.rank, "text": "é" * 100_000})["rank"]]

    def fail():
        raise errors.UserError("no such thing; try another")

    def slowly():
        time.sleep(0.5)
        return group.rank

    def differ():
        group.check_same({"--seed": 1, "--top_k": 10 + group.rank})

    for produce in (lambda: group.from_rank_0(fail), lambda: group.from_rank_0(slowly), differ):
        try:
            results.append(produce())
        except errors.UserError as error:
            results.append(f"UserError: {error}")
    group.check_same({"--seed": 1, "--stop": ["a"], "--profile": None})
    end = time.monotonic() + 10  # the last rank may be deleting the last message
    names = [name for i in range(6) for name in (f"message/{i}", f"message/{i}/0", f"message/{i}/readers")]
    while (kept := any(group.store.check([name]) for name in names)) and time.monotonic() < end:
        time.sleep(0.01)
    return [*results, kept]


def memory(group, path):
    """The most bytes that loading takes, of a rank and whole, and the bytes of the weights, of a rank and whole."""
    peaks, sizes = [], []
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)  # what is freed is gone, and not used again without being seen
    load_model(path, group=group)  # whatever is loaded at the first use
    for each in (group, tp.ALONE):
        gc.collect()  # of the model before this one
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = resident("VmHWM")
        model = load_model(path, group=each)
        peaks.append(resident("VmHWM") - before)
        sizes.append(sum(tensor.nbytes for tensor in model.parameters()))
        del model
    return [peaks, sizes]


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def backend(group):
    return [group.rank, group.size, group.backend, sorted(os.sched_getaffinity(0)), torch.get_num_threads()]


def digest(x):
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


TASKS = {task.__name__: task for task in (cli, logits, layers, sums, many_sums, odd_sums, told, memory, backend)}


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def act(what):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise RuntimeError(f"fault {FAULT}")
    elif what == "user error":
        raise errors.UserError(f"fault {FAULT}; mend it")
    elif what == "slow":
        time.sleep(0.02)
    else:
        raise ValueError(what)


def make_fault(at, do, there):
    """`at` "load", or the number of the row-parallel layer that is computed when it happens (of a tiny model, 4 a
    forward); a "slow" rank is so from there on. The file `there` says that it has."""
    real, calls = (generate.load_model if at == "load" else tp.RowParallel.forward), itertools.count(1)
    at = 1 if at == "load" else at

    @functools.wraps(real)
    def faulty(*args):
        call = next(calls)
        if call == at:
            there.touch()
        if call == at or (call > at and do == "slow"):
            act(do)
        return real(*args)

    if real is generate.load_model:
        generate.load_model = faulty
    else:
        tp.RowParallel.forward = faulty


def main():
    spec, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
    out = Path(spec["out"])
    (out / f"{rank}.pid").write_text(f"{os.getpid()} {os.environ['MASTER_PORT']}")
    if "tasks" in spec:
        results = []
        with tp.join("cpu", threads=spec.get("threads")) as group:
            for name, args in spec["tasks"]:
                results.append(TASKS[name](group, *args))
        (out / f"{rank}.json").write_text(json.dumps(results))
        return
    fault = spec["fault"]
    if rank in fault.get("ranks", ()) and "do" in fault:
        make_fault(fault["at"], fault["do"], out / f"{rank}.there")
    own = fault["args"] if rank in fault.get("ranks", ()) and "args" in fault else []
    sys.argv = ["generate.py", *spec["args"], *own]
    errors.run(generate.main)


if __name__ == "__main__":
    main()
