"""Times two ranks of one core each beside one process with two threads, on a CPU. They take turns, because the speed
of a machine changes over time.

    python scripts/tp_in_turns.py [--mode int4] [--shape 1b] [--ranks 2] [--turns 40]

Prints the median time of a decode step for both, and the share of the weights that a rank holds. A turn is 20 greedy
steps at position 100; the others sleep meanwhile.
"""

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.models import MODES, SHAPES, quantize_model, random_model  # noqa: E402
from config import ModelConfig  # noqa: E402
from engine import Engine, weight_bytes  # noqa: E402
from tp import join  # noqa: E402

STEPS = 20  # per turn; the first two are not counted


def take_turns(args: argparse.Namespace, folder: Path) -> None:
    """What the one process and each rank do."""
    with join("cpu") as group:
        model = random_model(ModelConfig.from_hf(SHAPES[args.shape]), "cpu", group=group)
        if args.mode != "bf16":
            model = quantize_model(model, args.mode, 32)
        engine = Engine(model, compile=True)
        engine.setup(1, 1024, plain=True)
        engine.warm_up()
        turns = []
        with open(folder / "lock", "w") as lock:
            for _ in range(args.turns):
                group.from_rank_0(lambda: fcntl.flock(lock, fcntl.LOCK_EX))
                times = []
                for _ in range(STEPS):
                    engine.sampler.position.fill_(100)
                    begun = time.perf_counter()
                    engine.step(0, 1024)[0].tolist()
                    times.append(time.perf_counter() - begun)
                turns.append((time.time(), statistics.median(times[2:])))
                fcntl.flock(lock, fcntl.LOCK_UN)
                time.sleep(0.2)
        if group.rank == 0:
            result = {"turns": turns, "weights": weight_bytes(model) + model.tok_embeddings.weight.nbytes}
            (folder / f"{group.size}.json").write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time ranks beside one process, in turns.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, default="int4", help="how the weights are stored")
    parser.add_argument("--shape", choices=[*SHAPES], default="1b", help="of the random model")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the torchrun")
    parser.add_argument("--turns", type=int, default=40, help="of each side")
    args = parser.parse_args()
    if "TP_IN_TURNS" in os.environ:
        take_turns(args, Path(os.environ["TP_IN_TURNS"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TP_IN_TURNS": folder}
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks)]
        commands = [[sys.executable, *launcher, *sys.argv] for launcher in ([], torchrun)]
        processes = [subprocess.Popen(command, env=environment) for command in commands]
        if any(process.wait() for process in processes):
            raise SystemExit("error: one of the processes failed; its message is above")
        one, ranks = (json.loads((Path(folder) / f"{size}.json").read_text()) for size in (1, args.ranks))
    begin = max(result["turns"][0][0] for result in (one, ranks))  # at the beginning and the end one may have run alone
    end = min(result["turns"][-1][0] for result in (one, ranks))
    steps = [[seconds for at, seconds in result["turns"] if begin <= at <= end] for result in (one, ranks)]
    single, shared = map(statistics.median, steps)
    counts = " and ".join(str(len(turns)) for turns in steps)
    print(
        f"{args.shape} {args.mode}, {counts} turns: one process {single * 1e3:.1f} ms a step, "
        f"{args.ranks} ranks {shared * 1e3:.1f} ms: {single / shared:.2f}x; weights of a rank "
        f"{ranks['weights'] / one['weights']:.3f}x"
    )


if __name__ == "__main__":
    main()
