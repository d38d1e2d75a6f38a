"""What bench.py measured, as medians and ratios, a table in Markdown and a chart.

report = {..., **summarize(about, times, prompt_length, new_tokens)}
print(markdown(report), end="")
plot(report, Path("bench.png"))         # needs matplotlib
"""

import importlib.util
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers import LLAMA_CPPS
from errors import log
from files import gb, write_atomically

# Of Okabe and Ito, which colour-blind people can tell apart.
COLORS = {"gpt-brisk": "#0072B2", "llama.cpp": "#E69F00", "ik_llama.cpp": "#009E73", "transformers": "#BBBBBB"}


# Further measurements: the heading of a table, and a line of it.
TABLES = {
    "positions": (
        "| decode at position | ms a token | more than at 100, ms | reading the cache in between, ms |",
        "| {mode}, {position} | {decode_ms:.1f} | {extra_ms:.2f} | {cache_read_ms:.2f} |",
    ),
    "batches": (
        "| rows at once, at position {length} | ms a step | tok/s together | times one row |",
        "| {mode}, {batch_size} | {decode_ms:.1f} | {decode_tok_s:.1f} | {times_one_row:.2f} |",
    ),
    "speculation": (
        "| greedy decoding | tok/s | tokens a step | times plain |",
        "| {mode}, {task}, {way} | {decode_tok_s:.1f} | {tokens_a_step:.2f} | {times_plain:.2f} |",
    ),
    "ragged": (
        "| prompts of all lengths | tok/s, prefill included | one by one | times that |",
        "| {mode}, {prompts} prompts, {rows} at a time | {decode_tok_s:.1f} | {single_tok_s:.1f} | {times_one:.2f} |",
    ),
    "sampling": (
        "| a decode step | ms | added, ms | added |",
        "| {mode}, vocabulary of {vocab_size}, {way} | {step_ms:.2f} | {added_ms:.2f} | {added_share:.1%} |",
    ),
    "startup": (
        "| process start to second token | nothing built | kernels built | all cached "
        "| memory over weights: loaded | used |",
        "| {mode} | {first_median_s:.1f} s | {cold_median_s:.1f} s | {warm_median_s:.1f} s | {loaded_to_weights:.2f} "
        "| {used_to_weights:.2f} |",
    ),
    "serving": (
        "| serve.py | one client, times generate.py | 16 clients, times one: 8 places | 16 places "
        "| a chat's second turn, first token | times the first turn | longest gap | kill -9 to an answer |",
        "| {mode} | {of_generate:.2f} | {times_one_8:.2f} | {times_one_16:.2f} | {second_turn_median:.2f} s "
        "| {of_first_turn:.3f} | {gap_median:.2f} s | {restart_median:.1f} s |",
    ),
    "soak": (
        "| 64 clients of serve.py | answers | parted at a tie | wrong | hung up | requests left | memory |",
        "| {mode}, {minutes:g} minutes | {answers} | {ties} | {wrong} | {hung_up} | {still_busy:.0f} "
        "| {memory_growth:+.1%} |",
    ),
}


def summarize(
    about: dict[str, dict[str, Any]], times: dict[str, dict], prompt_length: int, new_tokens: int
) -> dict[str, Any]:
    """Medians of what `take_turns` measured, and ratios of ours to each peer of the same mode.

    `about` says of each contender its program, mode and bytes_per_step. A ratio above 1: ours is faster.
    """
    bandwidth = statistics.median(value for t in times.values() for value in t["read_gb_s"])
    contenders = {}
    for name, t in times.items():
        prefill_s, step_s = statistics.median(t["prefill_s"]), statistics.median(t["decode_s"]) / new_tokens
        rate = about[name]["bytes_per_step"] / step_s / 1e9
        contenders[name] = {
            **about[name],
            **t,
            "prefill_tok_s": prompt_length / prefill_s,
            "decode_tok_s": 1 / step_s,
            "decode_ms": step_s * 1e3,
            "gb_s": rate,
            "roofline_share": rate / bandwidth,
        }
    ours = {c["mode"]: c for c in contenders.values() if c["program"] == "gpt-brisk"}
    ratios = []
    for mode in ours:
        for program in dict.fromkeys(c["program"] for c in contenders.values()):
            theirs = [c for c in contenders.values() if c["program"] == program and c["mode"] == mode]
            if program == "gpt-brisk" or not theirs:
                continue
            ratios.append({"mode": mode, "program": program, "variants": len(theirs)} | {
                key: ours[mode][f"{key}_tok_s"] / max(their[f"{key}_tok_s"] for their in theirs)
                for key in ("decode", "prefill")
            })  # fmt: skip
    roofline = {mode: bandwidth * 1e9 / c["bytes_per_step"] for mode, c in ours.items()}
    return {
        "read_bandwidth": {"gb_s": bandwidth, "decode_tok_s": roofline},
        "contenders": contenders,
        "ratios": ratios,
    }


def label(report: dict[str, Any], name: str) -> str:
    """A contender with its version."""
    program = report["contenders"][name]["program"]
    if program == "gpt-brisk":
        return name
    package = LLAMA_CPPS[program].package if program in LLAMA_CPPS else program
    return f"{name} ({report['machine']['versions'][package]})"


def workers(machine: dict[str, Any]) -> str:
    """What computed: "2 threads", "4 ranks of 8 threads"."""
    ranks, threads = machine["ranks"], machine["threads"]
    return (f"{ranks} ranks of " if ranks > 1 else "") + f"{threads} thread{'s' * (threads > 1)}"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables and a few lines."""
    machine, settings, bandwidth = report["machine"], report["settings"], report["read_bandwidth"]
    compiled = "compiled" if settings["compile_prefill"] else "eager"
    length = settings["prompt_length"]
    lines = [
        f"**{settings['name']}** on {machine['device']}, {workers(machine)}, "
        f"torch {machine['versions']['torch']}, {machine['date'][:10]}; medians of {settings['rounds']} rounds; "
        f"our prefill is {compiled}",
        "",
        f"| | prefill {length}, tok/s | decode, tok/s | ms a token | a step reads | GB/s | of the roofline |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, limit in bandwidth["decode_tok_s"].items():
        for name, row in report["contenders"].items():
            if row["mode"] == mode:
                lines.append(
                    f"| {label(report, name)} | {row['prefill_tok_s']:.1f} | {row['decode_tok_s']:.1f} "
                    f"| {row['decode_ms']:.1f} | {gb(row['bytes_per_step'])} | {row['gb_s']:.1f} "
                    f"| {row['roofline_share']:.0%} |"
                )
        lines.append(f"| *read bandwidth, {mode}* | | {limit:.1f} | | | {bandwidth['gb_s']:.1f} | 100% |")
    lines.append("")
    for ratio in report["ratios"]:
        better = f" (the better of its {ratio['variants']}, each)" if ratio["variants"] > 1 else ""
        lines.append(
            f"- {ratio['mode']}, ours / {ratio['program']}{better}: "
            f"decode {ratio['decode']:.2f}x, prefill {ratio['prefill']:.2f}x"
        )
    lines += [f"- skipped: {program}: {reason}" for program, reason in report["skipped"].items()]
    for mode, cache in report.get("long_cache", {}).items():
        lines.append(
            f"- {mode}, decode at position 100: {cache['short_ms']:.1f} ms a token with --max_seq_length "
            f"{cache['max_seq_length'][0]}, {cache['long_ms']:.1f} with {cache['max_seq_length'][1]}: "
            f"{cache['ratio']:.3f} to 1"
        )
    if report["peak_gpu_memory_gb"]:
        lines.append(f"- peak GPU memory, all contenders: {report['peak_gpu_memory_gb']:.2f} GB")
    for key, (heading, cells) in TABLES.items():
        rows = report.get(key, [])
        rows = [{"mode": mode, **row} for mode, row in rows.items()] if isinstance(rows, dict) else rows
        if rows:
            lines += ["", heading.format(length=length), "|---|" + "---:|" * (heading.count("|") - 2)]
            lines += [cells.format(**row) for row in rows]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of decode tok/s, a group for each mode, under the line that the read bandwidth draws, as wide as a page."""
    if importlib.util.find_spec("matplotlib") is None:
        log("no chart: matplotlib is not installed (pip install matplotlib)")
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    limits, contenders = report["read_bandwidth"]["decode_tok_s"], report["contenders"]
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    left, ticks, seen = 0.0, [], set()
    for mode, limit in limits.items():
        bars = [c for c in contenders.values() if c["mode"] == mode]
        best = {c["program"]: max(b["decode_tok_s"] for b in bars if b["program"] == c["program"]) for c in bars}
        for i, (program, rate) in enumerate(best.items()):
            drawn = axes.bar(
                left + i, rate, width=0.9, color=COLORS[program], label=None if program in seen else program
            )
            # Inside, where no line crosses it.
            axes.bar_label(drawn, fmt="%.1f", label_type="center", color="white" if program == "gpt-brisk" else "black")
            seen.add(program)
        roofline = None if "roofline" in seen else "read bandwidth / bytes of a step (ours)"
        axes.hlines(limit, left - 0.5, left + len(best) - 0.5, colors="black", linestyles="dashed", label=roofline)
        seen.add("roofline")
        ticks.append(left + (len(best) - 1) / 2)
        left += len(best) + 0.8
    axes.set_xticks(ticks, list(limits))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("decode, tokens a second")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    axes.set_title(f"{report['settings']['name']}, {machine['device']}, {workers(machine)}", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    with write_atomically(path) as file:
        figure.savefig(file, format="png")
