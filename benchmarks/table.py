"""README's tables, from the benchmarks' rows: `python -m benchmarks.table` prints them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.rows import Row, read_rows
from drkl.training.memory import MOMENTS

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "Not measured yet.\n"
TODAY = "today"
"""The code that is measured, in a column of rows that compare it with another."""


def cpu_table(rows: list[Row]) -> str:
    """Seconds, times the floor and extra memory of each variant, for every vocabulary at 1,024 positions in fp32."""
    rows = [row for row in rows if row["positions"] == "1024" and row["dtype"] == "float32" and _is_widest(row, rows)]
    settings = sorted({(int(row["vocab"]), int(row["hidden"])) for row in rows})
    found = {(int(row["vocab"]), row["variant"]): row for row in rows}
    head = " | ".join(f"V = {vocab:,}, hidden {hidden}: s | x floor | MiB" for vocab, hidden in settings)
    lines = [f"| 1,024 positions | {head} |", "|---" * (1 + 3 * len(settings)) + "|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for vocab, _ in settings:
            row, floor = found.get((vocab, name)), found[vocab, "floor"]
            if row is None:
                cells += ["", "", ""]
                continue
            seconds = float(row["least_s"])
            cells += [f"{seconds:.2f}", f"{seconds / float(floor['least_s']):.2f}", f"{int(row['extra_peak_mib']):,}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_widest(row: Row, rows: list[Row]) -> bool:
    """Whether a row is of today's code with the widest vector instructions that were measured."""
    widest = max(row["instructions"] for row in rows)  # AVX2, AVX512
    return row["code"] == TODAY and row["instructions"] == widest


def small_batches_table(rows: list[Row]) -> str:
    """Times the floor, for few positions and many: the code of before and today's, with all vector instructions."""
    rows = [row for row in rows if row["dtype"] == "float32" and row["vocab"] == "49152"]
    least = {
        (row["instructions"], row["code"], row["positions"], row["variant"]): float(row["least_s"]) for row in rows
    }
    counts = sorted({row["positions"] for row in rows if row["code"] != TODAY}, key=int)
    columns = [(kind, count) for kind in sorted({row["instructions"] for row in rows}) for count in counts]
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name.startswith(("floor", "fused"))]
    head = " | ".join(f"{kind}, {int(count):,}" for kind, count in columns)
    lines = [f"| x floor, before and today | {head} |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = []
        for kind, count in columns:
            taken = [least.get((kind, code, count, name)) for code in ("before", TODAY)]
            floors = [least.get((kind, code, count, "floor")) for code in ("before", TODAY)]
            if name == "floor":
                cells.append(f"{floors[1]:.3f} s" if floors[1] else "")
            else:
                ratios = [f"{t / f:.2f}" for t, f in zip(taken, floors, strict=True) if t and f]
                cells.append(", ".join(ratios))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gpu_table(rows: list[Row]) -> str:
    """Milliseconds, times the floor and extra memory of each variant, for every GPU."""
    tables = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        of_one = [row for row in rows if row["gpu"] == gpu]
        floor = next(float(row["median_ms"]) for row in of_one if row["variant"] == "floor")
        first = of_one[0]
        size = f"{int(first['positions']):,} positions, V = {int(first['vocab']):,}, hidden {first['hidden']}, bf16"
        lines = [f"| {gpu}: {size} | ms | x floor | MiB |", "|---|---|---|---|"]
        for row in of_one:
            milliseconds = float(row["median_ms"])
            ratio, peak = f"{milliseconds / floor:.2f}", f"{int(row['extra_peak_mib']):,}"
            lines.append(f"| {row['variant']} | {milliseconds:.1f} | {ratio} | {peak} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def gpu_day_table(rows: list[Row]) -> str:
    """What `scripts/gpu_day.sh` measured of whole runs, or that nothing was."""
    if not rows:
        return "Nothing of this has been measured on a GPU yet.\n"
    columns = {
        "s_per_step": "s a step", "tokens_per_second": "tokens a second", "seconds_generating": "of a step generating",
        "peak_mib": "peak MiB", "predicted_mib": "predicted MiB", "s": "s in all", "positions_per_second":
        "positions a second", "passed": "passed", "failed": "failed",
    }  # fmt: skip
    lines = [f"| GPU | part | of it | {' | '.join(columns.values())} | |", "|---" * (4 + len(columns)) + "|"]
    for row in rows:
        note = "" if row["status"] == "measured" else f"{row['status']}: {row['error']}"
        cells = [row["gpu"], row["part"], row["variant"], *(row[name] for name in columns), note]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def sampling_table(rows: list[Row], served: list[Row]) -> str:
    """Tokens per second of each way to sample; rates are compared within a go."""
    lines = ["| 64 tokens | prompts | precision | two cores of | tokens a second | x the other |", "|---|" + "---|" * 5]
    for row in (*rows, *served):
        beside = f", beside {served[1 - served.index(row)]['variant']}" if row in served else ""
        processor = " ".join(row["processor"].replace("(R)", "").replace("Processor", "").split())
        cells = (f"{row['variant']}{beside}", row["prompts"], row.get("precision", "fp32"), processor)
        rate = f"{float(row['median_tokens_per_second']):.0f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {rate} | {row['ratio']} |")
    return "\n".join(lines) + "\n"


def on_policy_table(rows: list[Row]) -> str:
    """An on-policy step of each trainer."""
    lines = [
        "| 8 prompts, answers of up to 64 tokens, fp32 | trained tokens a second | s a step "
        "| generating | learning | MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = [f"{float(row[f'{name}_s_per_step']):.2f}" for name in ("median", "generating", "learning")]
        cells = [row["variant"], row["tokens_per_second"], *seconds, f"{int(row['peak_mib']):,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def train_step_table(rows: list[Row]) -> str:
    """A step on data of each trainer; drkl with the same objective is the first."""
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    lines = [
        f"| {first['prompts']} rows a step, {first['tokens_per_step']} trained tokens, {first['precision']} "
        "| trained tokens a second | drkl's, x this | s a step (20 % to 80 %) | MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rate = float(row["tokens_per_second"])
        median, low, high = (f"{float(row[f'{name}_s_per_step']):.2f}" for name in ("median", "p20", "p80"))
        ratio = f"{float(first['tokens_per_second']) / rate:.2f}"
        cells = [row["variant"], f"{rate:.1f}", ratio, f"{median} ({low} to {high})", f"{int(row['peak_mib']):,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def step_profile_table(rows: list[Row]) -> str:
    """Where the time of a quickstart step goes."""
    if not rows:
        return NOT_MEASURED
    lines = ["| part of a step | share | s |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['part']} | {float(row['share']):.1%} | {float(row['s_per_step']):.3f} |")
    return "\n".join(lines) + "\n"


def teacher_cache_table(rows: list[Row]) -> str:
    """A step with the teacher, with its states remembered, and from caches, with the bytes of a position."""
    lines = ["| teacher | s a step | x of live | MiB | bytes a position |", "|---|---|---|---|---|"]
    steps = {row["variant"]: row for row in rows if row["median_s_per_step"]}
    passes = {row["variant"]: row["bytes_per_position"] for row in rows if row["bytes_per_position"]}
    sizes = {name.removeprefix("the pass, "): size for name, size in passes.items()}
    for name, row in steps.items():
        seconds = float(row["median_s_per_step"])
        ratio = seconds / float(steps["live"]["median_s_per_step"])
        size = sizes.get(name.removesuffix(", cold"), "")
        cells = [name, f"{seconds:.2f}", f"{ratio:.2f}", f"{int(row['peak_mib']):,}", f"{int(size):,}" if size else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def large_teacher_table(rows: list[Row]) -> str:
    """The bytes of a position for a teacher of today's larger sizes."""
    lines = ["| kept | bytes a position | GB for 100M positions |", "|---|---|---|"]
    for row in rows:
        name, found, about = row["variant"].partition(" (")
        if found and "hidden units" in about:
            size = int(row["bytes_per_position"])
            lines.append(f"| {name} | {size:,} | {size / 10:,.0f} |")
    return "\n".join(lines) + "\n"


def topk_probe_table(rows: list[Row]) -> str:
    """What k tokens keep of each objective: its value, and its gradient's direction."""
    students = list(dict.fromkeys(row["student"] for row in rows))
    ks = list(dict.fromkeys(row["k"] for row in rows))
    named = {"start": "before training", "drkl-hidden": "after it"}
    head = [f"k = {k}, {named.get(student, student)}" for student in students for k in ks]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    found = {(row["student"], row["k"], row["objective"]): row for row in rows}
    first = rows[0]["objective"]
    for name, key in (("mass", "mass"), ("mass of the tail", "tail_mass")):
        cells = [f"{100 * float(found[s, k, first][key]):.1f} %" for s in students for k in ks]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in dict.fromkeys(row["objective"] for row in rows):
        of_all = [found[s, k, name] for s in students for k in ks]
        cells = [f"{100 * float(row['share']):.1f} %, {float(row['degrees']):.1f}°" for row in of_all]
        about = " *" if of_all[0]["on_classes"] == "approximation" else ""
        lines.append(f"| {name}{about} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def topk_probe_tables() -> dict[str, str]:
    """Those of docs/teacher-cache.md, likewise."""
    return {"topk-probe": topk_probe_table(read_rows(RESULTS / "topk_probe.csv"))}


MEMORY_PARTS = {
    "weights": ("student_weights", "teacher_weights", "teacher_states", "start"),
    "gradients": ("gradients", "buckets"),
    "optimiser": ("optimiser",),
    "activations": ("activations",),
    "loss": ("loss", "answers"),
}
"""Columns of the table of memory, and the parts that each has."""


def memory_table(rows: list[Row]) -> str:
    """Predicted and measured memory of each case, and the parts of what is predicted."""
    lines = [
        f"| MiB | predicted | measured | ratio | at its peak | {' | '.join(MEMORY_PARTS)} |",
        "|---" * (5 + len(MEMORY_PARTS)) + "|",
    ]
    for row in rows:
        numbers = [f"{int(row[name]):,}" for name in ("predicted_mib", "measured_mib")]
        parts = [sum(int(row[f"{part}_mib"]) for part in names) for names in MEMORY_PARTS.values()]
        cells = [row["case"], *numbers, f"{float(row['ratio']):.2f}", MOMENTS[row["moment"]]]
        lines.append("| " + " | ".join([*cells, *(f"{size:,}" if size else "" for size in parts)]) + " |")
    return "\n".join(lines) + "\n"


def data_scale_table(rows: list[Row]) -> str:
    """The first start, the next one, and the memory that rows take, beside the code of before."""
    lines = ["| | rows | first start | of the tokenizer's own speed | next start | anonymous memory | on disk |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        disk = f"{row['disk_bytes_per_token']} bytes a token" if float(row["disk_bytes_per_token"]) else "nothing"
        cells = (
            row["code"],
            f"{int(row['rows']):,}",
            f"{float(row['first_seconds']):,.0f} s, {int(row['first_rows_per_second']):,} rows/s",
            f"{float(row['share_of_tokenizer']):.0%}",
            f"{float(row['next_seconds']):,.1f} s",
            f"+{int(row['rss_anon_grown_mb']):,} MB, at most +{int(row['rss_anon_peak_grown_mb']):,} MB",
            disk,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def data_scale_tables() -> dict[str, str]:
    """Those of docs/data.md, likewise."""
    return {"data-scale": data_scale_table(read_rows(RESULTS / "data_scale.csv"))}


def memory_tables() -> dict[str, str]:
    """Those of docs/scale.md, likewise."""
    return {"memory": memory_table(read_rows(RESULTS / "memory.csv"))}


def tables() -> dict[str, str]:
    """The tables by the marks between which README has them."""
    return {
        "fused-cpu": cpu_table(read_rows(RESULTS / "fused_loss.csv")),
        "fused-small": small_batches_table(read_rows(RESULTS / "fused_loss.csv")),
        "fused-gpu": gpu_table(read_rows(RESULTS / "fused_loss_gpu.csv")),
        "gpu-day": gpu_day_table(read_rows(RESULTS / "gpu_day.csv")),
        "sampling": sampling_table(read_rows(RESULTS / "rollouts.csv"), read_rows(RESULTS / "rollouts_vllm.csv")),
        "train-step": train_step_table(read_rows(RESULTS / "train_step.csv")),
        "step-profile": step_profile_table(read_rows(RESULTS / "step_profile.csv")),
        "on-policy": on_policy_table(read_rows(RESULTS / "on_policy.csv")),
        "teacher-cache": teacher_cache_table(read_rows(RESULTS / "teacher_cache.csv")),
        "large-teacher": large_teacher_table(read_rows(RESULTS / "teacher_cache.csv")),
    }


if __name__ == "__main__":
    for text in tables().values():
        print(text)
