"""Estimates the speed of tensor parallelism on GPUs by a formula, beside figures that gpt-fast published.

Nothing here is measured.

    python scripts/tp_on_paper.py                                                    # H100: 3.35 TB/s
    python scripts/tp_on_paper.py --bandwidth 4.8 --latency 18 24 29                 # H200; us on 2, 4 and 8 GPUs

A decode step on N GPUs takes

    bytes / (N x bandwidth x share)  +  (2 x layers + 2) x latency(N)

`bytes` is the size of the weights that a step reads: 2 bytes per weight in bf16, 1 in int8, 0.5625 in int4 with groups
of 32. `share` is the share of the peak bandwidth that the kernels reach. There is an all-reduce after the attention and
after the feed-forward of each layer, after the embedding and after the output projection. A token's hidden state has 8
to 16 kB, which NVLink sends in less than 0.1 us. So an all-reduce costs its latency, however wide the model is.

The latencies were chosen so that the formula gives gpt-fast's figures for Llama 2 7B (its README: A100s of 330 W,
one-shot all-reduces); they include the time that GPUs wait for each other. For 70B the formula then predicts.
"""

import argparse
import itertools

SHAPES = {  # layers, hidden size, feed-forward width, heads and key-value heads of head_dim, vocabulary
    "Llama 3.1 8B": (32, 4096, 14336, 32, 8, 128, 128256),
    "Llama 3.1 70B": (80, 8192, 28672, 64, 8, 128, 128256),
    "Llama 2 7B": (32, 4096, 11008, 32, 32, 128, 32000),
    "Llama 2 70B": (80, 8192, 28672, 64, 8, 128, 32000),
}
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5625}  # per weight
PUBLISHED = {  # gpt-fast's README, tok/s at batch 1
    ("Llama 2 7B", "bf16"): {1: 104.9, 2: 168.84, 4: 254.02, 8: 328.43},
    ("Llama 2 70B", "bf16"): {2: 21.32, 4: 38.01, 8: 62.50},
    ("Llama 2 70B", "int8"): {8: 80.44},
    ("Llama 2 70B", "int4"): {8: 90.77},
}


def step_bytes(shape: str, mode: str) -> float:
    """Bytes of the weights that a step reads: all but the embedding."""
    layers, dim, ffn, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    attention = dim * (heads + 2 * kv_heads) * head_dim + heads * head_dim * dim
    return (layers * (attention + 3 * dim * ffn) + vocabulary * dim) * BYTES[mode]


def tokens_a_second(shape: str, mode: str, gpus: int, bandwidth: float, share: float, latency: float) -> float:
    """The formula; bandwidth in TB/s, latency in us."""
    communication = (2 * SHAPES[shape][0] + 2) * latency * 1e-6 if gpus > 1 else 0
    return 1 / (step_bytes(shape, mode) / (gpus * bandwidth * 1e12 * share) + communication)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Estimate the decode speed of 1 to 8 GPUs.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--bandwidth", type=float, default=3.35, help="of one GPU's memory, in TB/s")
    add("--shares", type=float, nargs=3, default=[0.8, 0.8, 0.65], help="that bf16, int8 and int4 reach of it")
    add("--latency", type=float, nargs=3, default=[18, 24, 29], help="of an all-reduce on 2, 4 and 8 GPUs, in us")
    args = parser.parse_args()
    latency = dict(zip((1, 2, 4, 8), (0, *args.latency), strict=True))
    shares = dict(zip(BYTES, args.shares, strict=True))

    print(f"Formula, {args.bandwidth} TB/s, tok/s at batch 1 (share of communication):\n")
    print("| | a step reads, GB | 1 GPU | 2 | 4 | 8 |\n|---|---:|---:|---:|---:|---:|")
    for shape, mode in itertools.product(("Llama 3.1 8B", "Llama 3.1 70B"), BYTES):
        cells = []
        for gpus, us in latency.items():
            rate = tokens_a_second(shape, mode, gpus, args.bandwidth, shares[mode], us)
            waiting = (2 * SHAPES[shape][0] + 2) * us * 1e-6 * rate
            cells.append(f"{rate:.0f}" + (f" ({waiting:.0%})" if gpus > 1 else ""))
        print(f"| {shape} {mode} | {step_bytes(shape, mode) / 1e9:.1f} | {' | '.join(cells)} |")

    print("\ngpt-fast's published figures, and the formula with the 1.40 TB/s that its bf16 rate on one A100 means:\n")
    print("| | GPUs | published | formula |\n|---|---:|---:|---:|")
    for (shape, mode), rates in PUBLISHED.items():
        for gpus, rate in rates.items():
            share = {"bf16": 1.0, "int8": 1069 / 1397, "int4": 863 / 1397}[mode]  # as on one GPU
            paper = tokens_a_second(shape, mode, gpus, 1.397, share, latency[gpus])
            print(f"| {shape} {mode} | {gpus} | {rate:.1f} | {paper:.1f} |")


if __name__ == "__main__":
    main()
