"""A vLLM server for a run: its student in a folder, and the command that serves it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from drkl.client import address_of, host_and_port
from drkl.display import shell_line
from drkl.errors import DrklError
from drkl.models.precision import pick_device, resolve_dtype, torch_dtype
from drkl.models.student import make_student
from drkl.rollouts.served import INSTALL, check_servable, serve_command, served_copy, served_folder, write_served
from drkl.training.checks import check_device
from drkl.training.spec import (
    RunSpec,
    fitted,
    run_classes,
    run_configs,
    run_room,
    run_tokenizer,
    start_of,
    with_stand_in,
    without_server,
)


@dataclass(frozen=True)
class Serving:
    """How to start the server."""

    command: list[str]
    variables: dict[str, str]
    """Environment variables beside those that are set."""
    address: str
    """For ``rollouts.server``."""

    @property
    def line(self) -> str:
        """The command as a shell takes it."""
        return shell_line(["env", *(f"{name}={value}" for name, value in self.variables.items()), *self.command])

    def start(self) -> None:
        """Become the server: nothing after this call is reached."""
        os.execvpe(self.command[0], self.command, os.environ | self.variables)


def prepare_server(
    specs: Sequence[RunSpec],
    *,
    vllm: str = "vllm",
    host: str | None = None,
    port: int | None = None,
    more: Sequence[str] = (),
    check: bool = True,
) -> Serving:
    """Write the student of a run into the folder of its server, and return how to start the server.

    The student is the one that the run starts from. The run sends its own weights before each set of answers, so it
    fits every stage.

    Args:
        specs: the stages of the run.
        vllm: the executable.
        host: address to listen at; default that of ``rollouts.server``, or 127.0.0.1.
        port: likewise; default that of ``rollouts.server``, or 8000.
        more: further flags of ``vllm serve``.
        check: whether the executable has to be there.

    Raises:
        DrklError: no executable, a student that cannot be served, or a folder that cannot be written.
    """
    program = shutil.which(vllm)
    if program is None and check:
        raise DrklError(f"There is no executable {vllm!r} here. Install vLLM: {INSTALL}")
    specs = with_stand_in(specs, without_server)
    first = specs[0]
    answered = next((spec for spec in specs if spec.rollouts.is_on), specs[-1])
    if first.classifies:
        raise DrklError("A classification run has no answers, so it needs no rollout server.")
    given = host_and_port(answered.rollouts.server) if answered.rollouts.server else ("127.0.0.1", 8000)
    host, port = host or given[0], given[1] if port is None else port
    check_device(answered.run.device)
    tokenizer = run_tokenizer(specs)
    room = run_room(run_configs(first, tokenizer, run_classes(specs)), None)
    if room.separate:
        raise DrklError("The run's models are encoder-decoders, which vLLM does not serve; its answers are builtin.")
    limits = [(spec.data, spec.rollouts) for spec in fitted(specs, room)]
    longest = max(
        data.max_tokens + (rollouts.max_new_tokens or data.max_tokens - data.max_prompt_tokens)
        for data, rollouts in limits
    )
    student = make_student(first.student, start_of(first.student, first.teacher), first.run.seed, tokenizer)
    check_servable(student)
    folder = served_folder(answered.rollouts, answered.folder.root) / "start"
    write_served(served_copy(student), tokenizer, folder)
    command, variables = serve_command(
        program or vllm,
        folder.absolute(),
        dtype=torch_dtype(resolve_dtype(answered.training.precision, pick_device(answered.run.device))),
        max_model_len=longest if room.decoder is None else min(longest, room.decoder),
        host=host,
        port=port,
        more=more,
    )
    return Serving(command, variables, address_of(host, port))
