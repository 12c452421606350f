"""Tokens per second: the built-in sampler next to a vLLM server on the same processor.

    python -m benchmarks.rollouts_vllm STUDENT --vllm PATH [--prompts N] [--max-new-tokens N] [--repeats N]

The prompts, the student and the lengths are those of `benchmarks.rollouts`, in fp32. The server is started here, with
every core for its threads, and the two take turns: while one writes, the other waits. vLLM's row counts the writing;
``seconds_per_sync`` is what new weights cost before each set of answers, the probe included. Rows go to
benchmarks/results/rollouts_vllm.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.rollouts import Case
from benchmarks.rows import Row, commit, processor, spread, write_rows
from benchmarks.vllm_server import Server, free_address
from drkl._version import __version__
from drkl.client import Client, host_and_port
from drkl.models.load import quiet_transformers
from drkl.rollouts.answers import Request
from drkl.rollouts.config import RolloutsConfig
from drkl.rollouts.served import serve_command, served_copy, write_served
from drkl.rollouts.server import CALLER, ServerWriter

RESULTS = Path(__file__).parent / "results" / "rollouts_vllm.csv"
STARTUP = 1800
"""Seconds; the server compiles nothing, but reads 200 packages."""


def start(vllm: str, folder: Path, max_model_len: int) -> Server:
    """Start `vllm serve` of a folder, on a free port of this machine."""
    address = free_address()
    host, port = host_and_port(address)
    command, variables = serve_command(
        vllm, folder, dtype=torch.float32, max_model_len=max_model_len, host=host, port=port, more=["--enforce-eager"]
    )
    # By default vLLM leaves a core to its web server, which waits here while the other counts.
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "HF_HUB_OFFLINE": "1",
                "VLLM_LOGGING_LEVEL": "WARNING"}  # fmt: skip
    return Server(command, defaults | os.environ | variables, address, stdout=subprocess.DEVNULL)


def main() -> None:
    """Start the server, time the two in turns and write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("student")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.precision = "fp32"
    quiet_transformers()
    case = Case(options)
    longest = max(len(row.sampling_ids) for row in case.rows) + case.limit
    with tempfile.TemporaryDirectory() as place:
        write_served(served_copy(case.model), case.tokenizer, Path(place, "start"))
        server = start(options.vllm, Path(place, "start"), longest)
        try:
            if not server.wait(STARTUP):
                raise SystemExit("The server did not start; its messages stand above.")
            version = str(Client(server.address, 60.0, CALLER).ask("/version")["version"])
            config = RolloutsConfig(share=1.0, generator="vllm", server=server.address, batch_size=len(case.rows))
            prompts = [row.sampling_ids for row in case.rows]
            writer = ServerWriter(
                case.model, case.tokenizer, config, stops=case.stops, folder=Path(place), prompts=prompts
            )
            rows = _timed(case, writer, options.repeats, version)
        finally:
            server.stop()
    write_rows(RESULTS, rows, ("variant", "prompts", "max_new_tokens", "model", "threads", "processor"))


def _timed(case: Case, writer: ServerWriter, repeats: int, version: str) -> list[Row]:
    asked = [Request(row.id, 0, row.sampling_ids, row.sampling_ids, case.limit) for row in case.rows]

    def by_server(seed: int) -> int:
        return sum(len(answer.token_ids) for answer in writer.write(asked, seed=seed))

    variants: dict[str, Callable[[int], int]] = {"drkl, built-in": case.ours, f"vLLM {version}": by_server}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in variants}
    syncs = []
    for seed in range(repeats + 1):
        started = time.perf_counter()
        writer.sync(case.model, seed)
        syncs.append(time.perf_counter() - started)
        for name, write in variants.items():
            started = time.perf_counter()
            written = write(seed)
            found[name].append((written, written / (time.perf_counter() - started)))
    model = case.model.name_or_path.rstrip("/").split("/")[-2:][0]
    rows: list[Row] = []
    for name, numbers in found.items():
        counted = numbers[1:]  # the first round warms both up
        ratios = [own[1] / base[1] for own, base in zip(counted, found["drkl, built-in"][1:], strict=True)]
        rows.append(
            {
                "variant": name, **spread([rate for _, rate in counted], "tokens_per_second"),
                "ratio": f"{statistics.median(ratios):.2f}",
                "seconds_per_sync": "" if name.startswith("drkl") else f"{statistics.median(syncs[1:]):.2f}",
                "tokens": str(round(statistics.mean(written for written, _ in counted))),
                "prompts": str(len(case.rows)), "max_new_tokens": str(case.limit), "model": model,
                "parameters": str(sum(p.numel() for p in case.model.parameters())),
                "threads": str(torch.get_num_threads()), "repeats": str(repeats), "processor": processor(),
                "torch": torch.__version__, "transformers": transformers.__version__, "drkl": __version__,
                "commit": commit(),
            }
        )  # fmt: skip
        print(f"{name}: {rows[-1]['median_tokens_per_second']} tokens a second, {rows[-1]['ratio']} of the built-in's")
    return rows


if __name__ == "__main__":
    main()
