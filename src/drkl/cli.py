"""The command line: parses, calls, prints. Everything heavy is imported inside the commands."""

from __future__ import annotations

import ast
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from drkl._version import __version__
from drkl.disk import CannotWrite, explained
from drkl.display import shell_word
from drkl.errors import DrklError, Halted, did_you_mean
from drkl.outputs import Outputs
from drkl.processes import Place, launched, lost_another, raised_in_all, speechless, tell_launcher
from drkl.signals import KEPT, Stopped, check_stopped, handled, keep, say, wait
from drkl.terminal import (
    TrainingProgress,
    guard,
    print_analysis,
    print_evaluation,
    print_memory,
    print_probe,
    print_side_by_side,
    print_surveys,
    print_toy,
    progress_bars,
)
from drkl.terminal import say as print  # no text reaches a terminal but through it

app = typer.Typer(
    name="drkl",
    help="Distil a language model into a smaller one that is faithful to its teacher, and as diverse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArgument = Annotated[Path, typer.Argument(help="A run folder that `drkl distill` made.", show_default=False)]
# Of the commands that take a run, or any two models.
OptionalRun = Annotated[Path | None, typer.Argument(help="A run folder that `drkl distill` made.", show_default=False)]
RunOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="teacher.model=PATH loads the teacher, where it was moved or the run was trained from its cache.",
        show_default=False,
    ),
]
StudentOption = Annotated[
    str | None, typer.Option(help="In place of RUN: path or Hub id of a student; needs --output.", show_default=False)
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help="Path or Hub id of the teacher. Must share the student's vocabulary.", show_default=False),
]
DataOption = Annotated[
    str | None,
    typer.Option(help="Held-out rows: a file, or bundled:dolly-eval and the like.", show_default=False),
]
MaxRowsOption = Annotated[
    int | None, typer.Option(min=1, help="Without RUN: use only this many rows, the first ones.", show_default=False)
]
MaxPromptOption = Annotated[
    int | None, typer.Option(help="Without RUN: rows with a longer prompt are left out.", show_default=False)
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Without RUN: longer responses are cut.", show_default=False)]
TemplateOption = Annotated[
    str | None, typer.Option(help="Without RUN: how a prompt is written, as data.template.", show_default=False)
]
DtypeOption = Annotated[str, typer.Option(help="Without RUN: auto, fp32, bf16 or fp16.")]
DeviceOption = Annotated[str, typer.Option(help="Without RUN: auto, cpu, cuda or mps.")]


_PATIENCE = 5.0
"""Seconds that a process leaves another one to speak and to end."""
LOST = (
    "Another process of this run has ended, and this one cannot go on without it. The message of that process says "
    "why; if it left none, it was killed from outside, often for want of memory."
)


def main() -> None:
    """Run the command line; what a user can mend ends with a short message and status 2.

    Of several processes the first one speaks. A terminal, a pipe or a disk that no longer takes what is printed does
    not end the work; a command whose work is to print then ends with status 2.
    """
    outputs = Outputs()
    try:
        _main()
    except SystemExit as end:
        failure = outputs.lost()
        if end.code or failure is None:
            raise
        cause = f"what was printed is not all there: {failure.strerror or failure}."
        if sys.argv[1] in _DIVIDED:
            print(f"Warning: {cause} The work is done.", file=sys.stderr)
            raise
        print(f"Error: {cause[0].upper()}{cause[1:]} {KEPT.way_on}", file=sys.stderr)
        sys.exit(2)


def _main() -> None:
    """The command line, with standard streams that last."""
    place = Place()
    with handled(["drkl", *sys.argv[1:]]):
        try:
            place = launched()
            if place.is_first:
                app(standalone_mode=True)
            else:
                with speechless():
                    status = app(standalone_mode=False)
                sys.exit(status)
        except Exception as error:
            _fail(error, place)
        except Stopped as stopped:
            if place.count > 1:
                say(stopped.signum)
                _leave(128 + stopped.signum)
            raise


def _fail(error: Exception, place: Place) -> None:
    """End with an error. Of several processes the one that failed first, or the first one, is to be heard first."""
    check_stopped()
    lost = place.count > 1 and lost_another(error)
    if lost or not place.is_first:
        wait(_PATIENCE * (1 + lost))  # with the same error the first process ends the others meanwhile
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # of the command line itself
        error.show()
        sys.exit(error.exit_code)
    if isinstance(error, (MemoryError, RuntimeError)) and (told := _of_memory(error)):
        error = told
    error = explained(error)
    if place.count == 1 and not isinstance(error, DrklError):
        raise error
    text, status = "".join(traceback.format_exception(error)), 1
    if lost or isinstance(error, DrklError):
        from drkl.rollouts.config import in_words_of_config

        text, status = f"{LOST} {KEPT.text} {KEPT.way_on}" if lost else in_words_of_config(str(error)), 2
        if isinstance(error, CannotWrite):
            if KEPT.resume and not KEPT.there():
                keep("Nothing of the run is there any more.")
            text = f"{text} {KEPT.text} {KEPT.way_on}"
        elif isinstance(error, Halted):
            text = f"{text} {KEPT.way_on}"
    if place.is_first or not raised_in_all(error):
        who = "Error" if place.is_first else f"Error in process {place.number} of {place.count}, counted from 0"
        print(f"{who}: {text}", file=sys.stderr)
    if place.count > 1:
        tell_launcher(text)
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> NoReturn:
    """End one of several processes at once: what the libraries clean up waits for the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _of_memory(error: Exception) -> DrklError | None:
    """What is said of memory that ran out where nothing closer tells of it."""
    from drkl.models.memory import is_out_of_memory, reason_of

    if not is_out_of_memory(error):
        return None
    return DrklError(f"The memory ran out ({reason_of(error)}). Smaller models and shorter rows need less.")


def _version(value: bool) -> None:
    if value:
        print(f"drkl {__version__}")
        raise typer.Exit


_DIVIDED = ("distill", "cache", "evaluate", "analyze")
"""The commands whose work several processes divide; the first process does any other alone."""
_KEPT = {
    "distill": "Nothing of the run was written.",
    "cache": "What the teacher has read is kept.",
    "evaluate": "The parts that were finished are kept.",
    "analyze": "Nothing of the analysis is kept.",
    "toy": "The results that were finished are kept.",
    "study": "The cells that were finished are kept, and what the others have saved.",
}
"""What an end from outside leaves."""


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distil a language model into a smaller one that is faithful to its teacher, and as diverse."""
    keep(_KEPT.get(context.invoked_subcommand or "", "Nothing is half written."))
    guard()
    if context.invoked_subcommand not in _DIVIDED:
        _first_alone()


def _first_alone() -> None:
    """End the other processes of a launcher; this one goes on."""
    if not launched().is_first:
        raise typer.Exit


@contextmanager
def _together() -> Iterator[None]:
    """Let the processes of a launcher divide what is done inside; an error in one of them ends all."""
    if launched().count == 1:
        yield
        return
    from drkl.processes import join_launched

    with join_launched().joined():
        yield


@app.command()
def distill(
    config: Annotated[
        Path | None,
        typer.Argument(help="A yaml file, or the name of a recipe (see `drkl recipes`).", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. objective.name=rkl", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue this interrupted run.", show_default=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in its folder if there is one; other files there stay.")
    ] = False,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Continue the run of CONFIG if its folder exists, else start it: for a job that may be started again.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the config, sizes, and estimates of memory and time; write nothing."),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --dry-run: estimate for N processes, on a machine that may have other devices than this one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Distil a student as CONFIG says; stages one after the other."""
    from drkl.config import load_config
    from drkl.runs import RunFolder

    if (config is None) == (resume is None):
        raise DrklError("Give either a CONFIG or `--resume RUN`.")
    if processes is not None and not dry_run:
        raise DrklError("`--processes` goes with `--dry-run`; torchrun and accelerate launch start several processes.")
    if resume is not None:
        if overrides or overwrite or auto_resume or dry_run:
            raise DrklError("`--resume` goes on with the run as it was configured; it takes nothing beside the folder.")
        from drkl.run_models import config_of, relocated

        notes: list[str] = []
        loaded = relocated(config_of(RunFolder.open(resume)), resume)
    if overwrite and auto_resume:
        raise DrklError("`--overwrite` replaces a run that is there, and `--auto-resume` goes on with it; give one.")
    if config is not None:
        loaded, notes = load_config(config, overrides or [])
    for note in notes:
        print(note)
    from drkl.models.load import quiet_transformers

    quiet_transformers()
    if dry_run:
        from drkl.training.estimate import estimate

        plan = estimate(loaded.specs(), processes)
        if launched().is_first:
            _print_estimate(plan)
            print_memory(plan["stages"])
        return
    modes = {"resume": resume is not None, "overwrite": overwrite, "auto": auto_resume, "new": True}
    _distill(loaded, next(mode for mode, chosen in modes.items() if chosen))


def _distill(config: Any, mode: Any) -> None:
    from drkl.analysis.watch import watcher
    from drkl.training.checks import RunExists
    from drkl.training.run import distill as train
    from drkl.training.settings import InputsChanged

    folder = config.folder.root
    KEPT.prepared, KEPT.there = ["drkl", "distill", "--resume", str(folder)], config.folder.config_path.is_file
    try:
        with TrainingProgress() as listener:
            run = train(
                config.specs(),
                mode=mode,
                listener=listener,
                on_trainer=watcher(config.analysis),
                command=["drkl", *sys.argv[1:]],
            )
    except InputsChanged as error:
        raise DrklError(
            f"{error} Once they are back, `drkl distill --resume {shell_word(folder)}` goes on; `drkl distill CONFIG "
            "run.name=OTHER` starts a new run."
        ) from error
    except RunExists as error:
        raise DrklError(
            f"The run folder {str(folder)!r} exists. `--overwrite` replaces it, `--resume {shell_word(folder)}` "
            "continues it, run.name=OTHER makes another."
        ) from error
    logged = {name for line in run.read_train_log() for name in line}
    answers_alone = "eval_rollout_nll" in logged and "eval_nll" not in logged  # no responses to evaluate on
    then = "report" if answers_alone else "evaluate"
    print(f"The student is in {run.student_path}. Next: drkl {then} {shell_word(run.root)}")


def _print_estimate(plan: dict[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(plan, sort_keys=False, allow_unicode=True), end="")


@app.command()
def cache(
    config: Annotated[
        Path | None,
        typer.Argument(help="A yaml file, or the name of a recipe (see `drkl recipes`).", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. data.max_rows=100", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the cache is written.", show_default=False)
    ] = None,
    kind: Annotated[
        str,
        typer.Option(metavar="KIND", help="hidden: the teacher's last states, exact. topk: its k largest logits."),
    ] = "hidden",
    k: Annotated[
        list[int] | None,
        typer.Option(
            "--k",
            metavar="K",
            help="Logits of a position, with --kind topk. Default: 64. With --probe a k to try; may be repeated. "
            "Default: 16, 64 and 256.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            metavar="T",
            help="With --kind topk a further temperature of the loss, besides 1 and those of CONFIG; may be repeated.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write the I-th of N parts, to share the work. Default: all, or the process's part under torchrun.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes and an estimate of the time; write nothing.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Compare every file of a cache with its checksum.", show_default=False),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Measure on some rows what a cache of the k most probable tokens would lose, for each objective; "
            "write nothing.",
        ),
    ] = False,
    positions: Annotated[
        int | None,
        typer.Option(min=1, help="With --probe: the most positions, of whole rows. Default: 2000.", show_default=False),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --probe: a run folder, or a model, in place of the student that CONFIG starts from.",
            show_default=False,
        ),
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="With --probe: text or json. Default: text.", show_default=False)
    ] = None,
) -> None:
    """Run the teacher of CONFIG once over its rows and keep what it knows; teacher.cache=FOLDER trains from that."""
    if (config is None) == (verify is None):
        raise DrklError("Give either a CONFIG or `--verify FOLDER`.")
    asked = {"--positions": positions, "--student": student, "--format": output_format}
    if not probe and (alone := [flag for flag, value in asked.items() if value is not None]):
        raise DrklError(f"`{alone[0]}` goes with `--probe`, which is not given.")
    if verify is not None:
        if probe:
            raise DrklError("`--probe` measures a CONFIG, and `--verify` reads a cache; give one of them.")
        others = {"--output": output, "--kind": kind != "hidden", "--k": k, "--part": part,
                  "--temperature": temperature, "--dry-run": dry_run}  # fmt: skip
        if given := [flag for flag, value in others.items() if value]:
            raise DrklError(f"`--verify` reads a cache, and takes no `{given[0]}`; leave one of the two out.")
        _verify(verify)
        return
    if probe:
        assert config is not None
        writes = {"--output": output, "--part": part, "--dry-run": dry_run, "--temperature": temperature}
        if given := [flag for flag, value in writes.items() if value]:
            raise DrklError(
                f"`--probe` writes no cache, and takes no `{given[0]}`; leave one of the two out. Its temperature is "
                "loss.temperature of CONFIG."
            )
        _probe(config, overrides or [], kind, k, positions, student, output_format or "text")
        return
    if k is not None and len(k) > 1:
        raise DrklError(f"`--k` is given {len(k)} times, and a cache has one k; several go with `--probe`.")
    if output is None and not dry_run:
        raise DrklError("`--output FOLDER` is missing: where the cache is to be written.")
    from drkl.config import load_config
    from drkl.models.load import quiet_transformers
    from drkl.training.estimate import estimate_cache
    from drkl.training.run import Listener, cache_states

    one_k = k[0] if k else None
    own = launched()
    number, of = (own.number + 1, own.count) if part is None else _part(part)
    assert config is not None
    loaded, notes = load_config(config, overrides or [])
    for note in notes:
        print(note)
    quiet_transformers()
    if dry_run:
        _first_alone()
        with _options_named_as_flags(_CACHE_OPTIONS):
            found = estimate_cache(loaded.specs(), kind=kind, k=one_k, temperatures=temperature or ())
        _print_estimate(found)
        return
    assert output is not None
    with progress_bars() as on_progress, _options_named_as_flags(_CACHE_OPTIONS):
        made = cache_states(
            loaded.specs(),
            output,
            kind=kind,
            k=one_k,
            temperatures=temperature or (),
            part=number - 1,
            parts=of,
            listener=Listener(on_message=print),
            progress=lambda done, total: on_progress("the teacher reads", done, total),
        )
    if made is None:
        print(f"Part {number} of {of} is written. The cache is finished when all parts are.")
        return
    size = sum(file["bytes"] for file in made.manifest["files"].values())
    what = "the states" if kind == "hidden" else f"{made.manifest['k']} logits and the rest"
    print(
        f"{output} has {what} of {made.manifest['rows']:,} rows at {made.manifest['positions']:,} positions "
        f"({size / 2**20:,.1f} MiB). Next: drkl distill {shell_word(config)} "
        f"{shell_word(f'teacher.cache={output}')}"
    )


def _probe(
    config: Path,
    overrides: list[str],
    kind: str,
    k: list[int] | None,
    positions: int | None,
    student: str | None,
    form: str,
) -> None:
    import json

    from drkl.analysis.probe import POSITIONS, probe_specs
    from drkl.config import load_config
    from drkl.models.load import quiet_transformers
    from drkl.teachers.stored import check_kind
    from drkl.training.run import Listener

    with _options_named_as_flags(_CACHE_OPTIONS):
        check_kind(kind, None, ())
    if form not in ("text", "json"):
        raise DrklError(f"--format is {form!r}; expected text or json.")
    # What a program reads stays free of sentences; a person still gets them.
    notes = sys.stderr if form == "json" else sys.stdout
    loaded, said = load_config(config, overrides)
    for note in said:
        print(note, file=notes)
    quiet_transformers()
    with _together(), progress_bars(notes) as on_progress, _options_named_as_flags(_PROBE_OPTIONS):
        found = probe_specs(
            loaded.specs(),
            student=student,
            k=k,
            positions=POSITIONS if positions is None else positions,
            listener=Listener(on_message=lambda text: print(text, file=notes)),
            progress=lambda done, total: on_progress("both models read", done, total),
        )
    _first_alone()
    if form == "json":
        print(json.dumps(found.to_json(), indent=2, allow_nan=False))
    else:
        print_probe(found)


def _part(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise DrklError(f"--part is {text!r}; expected I/N with I from 1 to N, e.g. 3/16.")
    return int(number), int(of)


def _verify(folder: Path) -> None:
    from drkl.teachers.shards import ShardReader

    _first_alone()
    reader = ShardReader(folder)
    names = [*reader.manifest["files"]]
    with progress_bars() as on_progress:
        for done, _ in enumerate(reader.verify()):
            on_progress("files", done, len(names))
        on_progress("files", len(names), len(names))
    print(f"{folder}: {len(names)} files as they were written, {len(reader):,} rows.")


@app.command("rollout-server")
def rollout_server(
    config: Annotated[
        Path, typer.Argument(help="A yaml file, or the name of a recipe (see `drkl recipes`).", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="section.key=value; after `--` flags of `vllm serve`, e.g. -- --gpu-memory-utilization 0.4",
            show_default=False,
        ),
    ] = None,
    vllm: Annotated[str, typer.Option(metavar="PATH", help="The executable of vLLM.")] = "vllm",
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen at. Default: that of rollouts.server, or 127.0.0.1.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port to listen at. Default: that of rollouts.server, or 8000.", show_default=False
        ),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Write the student, and print the command in place of running it.")
    ] = False,
) -> None:
    """Start a vLLM server that writes the answers of CONFIG's run (rollouts.generator=vllm); Ctrl-C ends it."""
    from drkl.config import load_config
    from drkl.models.load import quiet_transformers
    from drkl.training.serving import prepare_server

    given = overrides or []
    flags = next((i for i, word in enumerate(given) if word.startswith("-")), len(given))
    # A run that asks a server needs its address, which is not known yet.
    loaded, notes = load_config(config, [*given[:flags], "rollouts.generator=builtin"])
    quiet_transformers()
    with _options_named_as_flags():
        serving = prepare_server(
            loaded.specs(), vllm=vllm, host=host, port=port, more=given[flags:], check=not print_only
        )
    if print_only:
        print(serving.line)
        return
    for note in notes:
        print(note)
    print(f"Starting {serving.line}")
    print(
        f"Once it says that its startup is complete: drkl distill {shell_word(config)} rollouts.generator=vllm "
        f"rollouts.server={serving.address}",
        flush=True,
    )
    serving.start()


@app.command()
def evaluate(
    run: OptionalRun = None,
    overrides: RunOverrides = None,
    student: StudentOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for eval.json and its files. Default: RUN.", show_default=False)
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With RUN: what is measured, as teacher,student. Default: teacher, before, warmup and student.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WHERE]",
            help="A named test set in place of the held-out rows: dolly, self-instruct, vicuna, sni, unni, scitldr or "
            "dialogue; WHERE is a file, a Hub id, or `bundled`. May be repeated.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="minillm: use MiniLLM's prompt format, decoding and seeds.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Number of prompts to answer (in each suite), or all.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of answers per prompt and seed.", show_default=False)
    ] = None,
    sampling_temperature: Annotated[
        float | None, typer.Option(help="Main sampling temperature.", show_default=False)
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Further sampling temperatures, as 0.5,0.7,1.0,1.2,1.5; or none.", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Random seeds for sampling, as 10,20,30.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens in an answer. Default: 64, or half of a shorter context.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Number of answers decoded at once.", show_default=False)
    ] = None,
    logit_temperature: Annotated[
        str | None,
        typer.Option(
            metavar="T|fit|fit_to_teacher|none",
            help="Measure the student once more with its logits divided by T, or by what fits either half of the rows "
            "best, for the other half.",
            show_default=False,
        ),
    ] = None,
    max_rows: MaxRowsOption = None,
    max_prompt_tokens: MaxPromptOption = None,
    max_tokens: MaxTokensOption = None,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Compute everything again; do not reuse parts of an earlier evaluation."),
    ] = False,
) -> None:
    """Measure fidelity, diversity and calibration of a run, or of any student beside any teacher: eval.json."""
    from drkl.evaluation.evaluate import evaluate as evaluate_pair
    from drkl.models.load import quiet_transformers
    from drkl.run_models import evaluate_run

    if (run is None) == (student is None):
        raise DrklError("Give either a RUN, or `--student PATH --teacher PATH --data FILE --output DIR`.")
    pair = {"teacher": teacher, "data": data, "max_rows": max_rows, "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max_tokens, "template": template}  # fmt: skip
    settings = _evaluation_settings(
        {"samples_per_prompt": samples, "sampling_temperature": sampling_temperature, "max_new_tokens": max_new_tokens,
         "batch_size": batch_size}, prompts, sweep, seeds,
    )  # fmt: skip
    if logit_temperature is not None:
        settings["logit_temperature"] = _logit_temperature(logit_temperature)
    loaded = _teacher_model(overrides)
    named: dict[str, Any] = {} if models is None else {"models": tuple(_split("--models", models))}
    if run is not None:
        _refuse_beside_a_run(pair, dtype, device)
    else:
        if models is not None:
            raise DrklError("`--models` goes with RUN: of a pair both are measured. Leave it out.")
        output = _output_folder(output)
        if (data is None) == (not suite):
            came = "neither" if data is None else "both"
            raise DrklError(f"Expected exactly one of --data FILE and --suite NAME=WHERE; got {came}.")
        _check_choices(dtype, device)
    quiet_transformers()
    shared: dict[str, Any] = {
        "suites": suite or (), "protocol": protocol, "output_dir": output, "fresh": fresh,
        "facts": {"command": ["drkl", *sys.argv[1:]]}, **settings,
    }  # fmt: skip
    with _together(), _options_named_as_flags(), progress_bars() as on_progress:
        if run is not None:
            evaluation = evaluate_run(run, teacher_model=loaded, on_progress=on_progress, **named, **shared)
        else:
            evaluation = evaluate_pair(
                str(student), teacher, data, max_rows=max_rows, max_prompt_tokens=max_prompt_tokens,
                max_tokens=max_tokens, template=template or "auto", dtype=dtype, device=device,
                on_progress=on_progress, **shared,
            )  # fmt: skip
    _first_alone()
    print_evaluation(evaluation)
    assert evaluation.folder is not None
    print(f"Written: {evaluation.folder / 'eval.json'}. Next: drkl report {shell_word(evaluation.folder)}")


def _evaluation_settings(
    given: dict[str, Any], prompts: str | None, sweep: str | None, seeds: str | None
) -> dict[str, Any]:
    """The fields of the evaluation's settings that were set by flags."""
    settings = {name: value for name, value in given.items() if value is not None}
    if prompts is not None:
        settings["prompts"] = (
            None if prompts == "all" else _numbers("--prompts", prompts, int, "a whole number, or all")
        )
    for flag, text, kind in (("--sweep", sweep, float), ("--seeds", seeds, int)):
        if text is not None:
            wanted = "numbers with commas between them, or none"
            parts = [] if text.strip() in ("", "none", "[]") else text.strip("[] ").replace(",", " ").split()
            settings[flag[2:]] = tuple(_numbers(flag, part, kind, wanted, text) for part in parts)
    return settings


def _logit_temperature(text: str) -> float | str | None:
    """A number as one; the settings say what else there is."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(flag: str, part: str, kind: Any, wanted: str, text: str | None = None) -> Any:
    try:
        return kind(part)
    except ValueError as error:
        raise DrklError(f"{flag} is {text or part!r}; expected {wanted}.") from error


def _output_folder(output: Path | None) -> Path:
    """Return the folder for an evaluation or an analysis of a pair."""
    from drkl.evaluation.evaluate import check_output

    if output is None:
        raise DrklError("--output is missing: the folder for the results.")
    with _options_named_as_flags():
        check_output(output)
    return output


def _check_choices(dtype: str, device: str) -> None:
    for flag, value, allowed in (("dtype", dtype, "auto fp32 bf16 fp16"), ("device", device, "auto cpu cuda mps")):
        if value not in allowed.split():
            raise DrklError(f"--{flag} is {value!r}; expected one of {', '.join(allowed.split())}.")


_OPTIONS = {
    "output_dir": "--output", "data.max_prompt_tokens": "--max-prompt-tokens", "data.max_tokens": "--max-tokens",
    "samples_per_prompt:": "--samples:", "device is": "--device is", "takes rows": "takes --data",
    "name its executable:": "name its executable: --vllm", "use it by that name": "name that one as --student",
    "models has": "--models has", "models leaves": "--models leaves",
    **{f"{name}:": f"--{name.replace('_', '-')}:" for name in
       ("prompts", "sampling_temperature", "sweep", "seeds", "max_new_tokens", "batch_size", "logit_temperature")},
}  # fmt: skip
"""Names of options in the library, and the flags that set them."""
_CACHE_OPTIONS = {
    r"\bkind\b(?= is '| to '| '(topk|hidden)')": "--kind",
    r"\btemperatures\b(?= goes| has| out)": "--temperature",
    r"(?:^|(?<=Leave ))k(?= is | goes | out)": "--k",
}
"""Patterns of such names in the messages of `drkl cache`, and the flags."""
_PROBE_OPTIONS = {r"^k(?= is )": "--k", r"give k,": "give --k,", r"^student(?= is )": "--student"}
"""The same where it probes."""


@contextmanager
def _options_named_as_flags(patterns: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let the messages of errors inside the block speak of flags: those of ``patterns``, else of `_OPTIONS`."""
    try:
        yield
    except CannotWrite:
        raise  # it names no option
    except DrklError as error:
        text = str(error)
        for pattern, flag in (patterns or {re.escape(name): flag for name, flag in _OPTIONS.items()}).items():
            text = re.sub(pattern, flag, text)
        text = re.sub(
            r"(The run ('.*'|\".*\") has no student yet); resume its training first\.",
            lambda found: (
                f"{found[1]}; `drkl distill --resume {shell_word(ast.literal_eval(found[2]))}` goes on with it."
            ),
            text,
        )
        raise DrklError(text) from error


@app.command()
def analyze(
    run: OptionalRun = None,
    overrides: RunOverrides = None,
    student: StudentOption = None,
    teacher: TeacherOption = None,
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json and analysis/ (default: RUN).", show_default=False)
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Objectives, e.g. rkl,drkl:0.1,drkl@student,rkl+gjs:0.5. Default: all, and more.", show_default=False
        ),
    ] = None,
    positions: Annotated[
        int,
        typer.Option(help="Number of positions at which to differentiate every objective; means use all positions."),
    ] = 512,
    gamma: Annotated[
        float | None,
        typer.Option(
            help="gamma of decoupled objectives that name none. Default: the run's, else 0.5.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the losses; divides both models' logits.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the bootstrap intervals.")] = 0,
    max_rows: MaxRowsOption = None,
    max_prompt_tokens: MaxPromptOption = None,
    max_tokens: MaxTokensOption = None,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure whether reverse KL makes a student overconfident, and what every objective would do to it."""
    from drkl.analysis.analyze import analyze as analyze_pair
    from drkl.models.load import quiet_transformers
    from drkl.reporting import analysis as figures
    from drkl.run_models import analyze_run

    if (run is None) == (student is None):
        raise DrklError("Give either a RUN, or `--student PATH --teacher PATH --data FILE --output DIR`.")
    pair = {"teacher": teacher, "data": data, "max_rows": max_rows, "max_prompt_tokens": max_prompt_tokens,
            "max_tokens": max_tokens, "template": template}  # fmt: skip
    loaded = _teacher_model(overrides)
    if run is not None:
        _refuse_beside_a_run(pair, dtype, device)
    else:
        for name, value in (("teacher", teacher), ("data", data)):
            if value is None:
                raise DrklError(f"--{name} is missing: a student is analysed beside its teacher, on held-out rows.")
        output = _output_folder(output)
        _check_choices(dtype, device)
    quiet_transformers()
    shared: dict[str, Any] = {
        "objectives": None if objectives is None else _split("--objectives", objectives), "positions": positions,
        "gamma": gamma, "temperature": temperature, "seed": seed, "output_dir": output,
        "command": ["drkl", *sys.argv[1:]],
    }  # fmt: skip
    with _together(), _options_named_as_flags(), progress_bars() as on_progress:
        if run is not None:
            result = analyze_run(run, teacher_model=loaded, on_progress=on_progress, **shared)
        else:
            result = analyze_pair(
                str(student), str(teacher), data, max_rows=max_rows, max_prompt_tokens=max_prompt_tokens,
                max_tokens=max_tokens, template=template or "auto", dtype=dtype, device=device,
                on_progress=on_progress, **shared,
            )  # fmt: skip
    _first_alone()
    folder = output or run
    assert folder is not None
    keep("analysis.json is written, and not all of its figures.")
    paths = figures.write_figures(result.to_json(), folder / "analysis")
    print_analysis(result.findings, figures.table(result.to_json()))
    print(
        f"Written: {folder / 'analysis.json'} and {len(paths)} figures beside {folder / 'analysis' / 'positions.csv'}."
    )
    print(f"Next: drkl report {shell_word(folder)}")


def _teacher_model(overrides: list[str] | None) -> str | None:
    """The teacher to load for a run; nothing else of its config can be given beside it."""
    name = None
    for text in overrides or ():
        key, _, name = text.partition("=")
        if key != "teacher.model" or not name:
            raise DrklError(
                f"{text!r} is given beside a run; expected teacher.model=PATH or nothing. A run brings the rest of its "
                "config; options set what is measured (see --help)."
            )
    return name


def _refuse_beside_a_run(pair: dict[str, Any], dtype: str, device: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in pair.items() if value is not None]
    given += [f"--{name}" for name, value in (("dtype", dtype), ("device", device)) if value != "auto"]
    if given:
        raise DrklError(f"{', '.join(given)}: a run brings its own; leave it out, or name --student in place of RUN.")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder, or an output folder of `drkl evaluate --student`. Several are shown side by side.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: RUN/report.html (.md, .csv).", show_default=False),
    ] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="html, md (words and tables) or csv (one line per number).")
    ] = "html",
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Also draw the numbers and curves of the first run to this .svg or .png.", show_default=False
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from drkl.reporting import page, write_picture

    page.checked_format(output_format)
    # The picture first: it has more ways to be refused, and then nothing is written.
    picture_path = None if picture is None else write_picture(runs[0], picture)
    print(f"The report is {page.report(runs, output, output_format=output_format)}")
    if picture_path is not None:
        print(f"The picture is {picture_path}")


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="A: an evaluated run, or pair of models.", show_default=False)],
    run_b: Annotated[
        Path, typer.Argument(help="B: another run or pair, evaluated on the same data.", show_default=False)
    ],
    output_format: Annotated[str, typer.Option("--format", help="text, md, csv or json")] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the comparison to this file instead of printing it.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for the resampling.")] = 0,
) -> None:
    """Compare two evaluated students on the same rows and prompts, with paired intervals for B - A."""
    import shutil

    from drkl.evaluation.comparison import compare as paired_differences
    from drkl.reporting.differences import FORMATS, as_text
    from drkl.runs import write_text

    if output_format not in FORMATS:
        raise DrklError(f"--format is {output_format!r}; expected {', '.join(FORMATS)}.")
    comparison = paired_differences(run_a, run_b, seed=seed)
    if output_format in ("csv", "json") or output is not None:
        # What a program reads stays free of sentences; a person still gets them.
        notes = sys.stdout if output is not None else sys.stderr
        for line in (*(f"Warning: {warning}" for warning in comparison.warnings), *comparison.summary()):
            print(line, file=notes)
    if output is not None:
        write_text(output, FORMATS[output_format](comparison))
        print(f"Written: {output}")
    elif output_format == "text":
        print(as_text(comparison, width=shutil.get_terminal_size((120, 24)).columns), end="")
    else:
        print(FORMATS[output_format](comparison), end="")


class _StudyWords:
    """The words of the commands that a study runs."""

    def train(self, config: Path) -> list[str]:
        return ["distill", str(config), "--auto-resume"]

    def cache(self, config: Path, folder: Path, kind: str, temperatures: Sequence[float]) -> list[str]:
        of_kind = [word for value in temperatures for word in ("--temperature", str(value))]
        return ["cache", str(config), "--output", str(folder), "--kind", kind, *of_kind]

    def evaluate(self, run: Path, teacher: str | None) -> list[str]:
        loaded = [] if teacher is None else [f"teacher.model={teacher}"]
        return ["evaluate", str(run), *loaded, "--models", "teacher,student"]


@app.command()
def study(
    definition: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="A yaml file (docs/studies.md says what it has).", show_default=False),
    ],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the cells with their states, and what is left takes; write nothing."),
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Run the I-th of N parts, to share the work. Default: all.", show_default=False
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of cells that run at once; they share the cores.")] = 1,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write study.html, study.json and table.md of what is there.")
    ] = False,
) -> None:
    """Run what is missing of a study (a grid of runs over seeds, with verdicts), again and again until it is whole."""
    from drkl.studies.folder import settle
    from drkl.studies.plan import load_study
    from drkl.studies.pricing import price
    from drkl.studies.running import part_of
    from drkl.studies.starts import unpaired

    if report and (dry_run or part is not None or jobs > 1):
        raise DrklError("`--report` runs nothing: leave `--dry-run`, `--part` and `--jobs` out.")
    number, of = (1, 1) if part is None else _part(part)
    plan = load_study(definition)
    if dry_run:
        from drkl.studies.folder import check_same

        others = [f"Since the first cell began: {line}." for line in check_same(plan)]
        for line in (*plan.notes, *unpaired(plan), *others, *price(plan, part_of(plan, number, of), jobs).lines()):
            print(line)
        return
    if report and not (plan.folder / "env.json").is_file():
        raise DrklError(
            f"The study in {str(plan.folder)!r} has not begun: there is nothing to report. `drkl study "
            f"{shell_word(definition)}` runs it."
        )
    for line in settle(plan, ["drkl", *sys.argv[1:]]):
        print(f"Since the first cell began: {line}.")
    if report:
        _report_study(plan.folder)
        return
    for line in (*plan.notes, *unpaired(plan)):
        print(line)
    _run_study(plan, (number, of), jobs)


def _run_study(plan: Any, part: tuple[int, int], jobs: int) -> None:
    from drkl.studies.commands import Commands
    from drkl.studies.running import run_study
    from drkl.terminal import StudyProgress

    with StudyProgress() as listener:
        outcome = run_study(plan, _StudyWords(), part=part, commands=Commands(jobs), listener=listener)
    if outcome.elsewhere:
        print(f"Other processes work on {', '.join(outcome.elsewhere)}.")
    if outcome.failed:
        print(f"{len(outcome.failed)} cells have failed; the same command tries them again:", file=sys.stderr)
        for name, message in outcome.failed.items():
            print(f"  {name}: {message}", file=sys.stderr)
        raise typer.Exit(1)
    if not outcome.elsewhere:
        what = "The study" if part == (1, 1) else f"Part {part[0]} of {part[1]}"
        print(f"{what} is whole. Next: drkl study {shell_word(plan.path)} --report")


def _report_study(folder: Path) -> None:
    from drkl.runs import write_json, write_text
    from drkl.studies.page import as_html
    from drkl.studies.result import Study, as_markdown

    found = Study.load(folder)
    write_json(folder / "study.json", found.to_json())
    write_text(folder / "table.md", as_markdown(found))
    write_text(folder / "study.html", as_html(found))
    print(f"Written: {folder / 'study.html'}, {folder / 'study.json'} and {folder / 'table.md'}.")


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    overrides: RunOverrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of answers of each model.")] = 1,
    sampling_temperature: Annotated[
        float, typer.Option(min=1e-3, help="Sampling temperature; 1 is the models' own distribution.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens in an answer. Default: 128, or half of a shorter context.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed gives the same answers.")] = 0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
) -> None:
    """Print the answers of teacher and student to a prompt side by side (for classifiers, the classes of a text)."""
    from drkl.data.lengths import check_answer, fit_answer
    from drkl.data.tokenize import encode_for
    from drkl.models.forward import is_encoder_decoder
    from drkl.models.generate import sample_texts
    from drkl.models.load import quiet_transformers
    from drkl.run_models import answering_models, open_finished

    if not prompt.strip():
        raise DrklError("--prompt is empty.")
    loaded = _teacher_model(overrides)
    with _options_named_as_flags():
        _, config, specs = open_finished(run)
    quiet_transformers()
    models, tokenizer, device, room, note = answering_models(specs, loaded)
    if note is not None:
        print(note)
    if config.task == "classification":
        print_side_by_side(_classify(prompt, models, tokenizer, device, config.data.fitted(room).max_tokens))
        return
    answers = {}
    for name, load in models.items():
        model: Any = load()
        ids = encode_for(
            tokenizer,
            [{"role": "user", "content": prompt}],
            config.data.prompt_template,
            encoder_decoder=is_encoder_decoder(model),
        )
        with _options_named_as_flags():
            length = max_new_tokens or fit_answer(128, room, len(ids))
            check_answer(length, room, len(ids))
        generations = sample_texts(
            model.to(device).eval(),
            tokenizer,
            [ids],
            samples_per_prompt=1 if greedy else samples,
            sampling_temperature=sampling_temperature,
            max_new_tokens=length,
            seed=seed,
            greedy=greedy,
            template=config.data.prompt_template,
        )
        answers[name] = [answer.text for answer in generations[0]]
    print_side_by_side(answers)


def _classify(prompt: str, models: Any, tokenizer: Any, device: Any, max_tokens: int) -> dict[str, list[str]]:
    from drkl.run_models import most_probable

    answers = {}
    for name, load in models.items():
        classes = most_probable(load().to(device).eval(), tokenizer, prompt, max_tokens=max_tokens)
        answers[name] = ["\n".join(f"{p:.3f}  {label}" for label, p in classes)]
    return answers


@app.command()
def data(
    config: Annotated[
        Path, typer.Argument(help="A yaml file, or the name of a recipe (see `drkl recipes`).", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, e.g. data.turns=all", show_default=False)
    ] = None,
) -> None:
    """Show the rows that CONFIG trains on: counts, drops, lengths, and one row of each source; write nothing."""
    from drkl.config import load_config
    from drkl.data.survey import survey
    from drkl.models.load import quiet_transformers
    from drkl.models.pair import check_rows
    from drkl.training.spec import (
        fitted,
        run_classes,
        run_configs,
        run_ends,
        run_room,
        run_tokenizer,
        teacher_tokenizer,
        tokenizer_name,
    )

    loaded, notes = load_config(config, overrides or [])
    for note in notes:
        print(note)
    quiet_transformers()
    specs = loaded.specs()
    tokenizer, classes = run_tokenizer(specs), run_classes(specs)
    configs = run_configs(specs[0], tokenizer, classes)
    room = run_room(configs, classes)
    kind: dict[str, Any] = {"classes": classes, "encoder_decoder": room.separate, "room": room}
    kind["ends"] = () if classes is not None else run_ends(specs[0], tokenizer)
    kind["teacher_tokenizer"] = teacher_tokenizer(specs, tokenizer_name(specs))
    needs: dict[Any, bool] = {}
    for spec in fitted(specs, room):
        needs[spec.data] = needs.get(spec.data, False) or spec.rollouts.needs_responses
    for section, needed in needs.items():
        surveys = survey(section, tokenizer, needs_responses=needed, **kind)
        for part in surveys:
            check_rows(part.rows, configs)
        print_surveys(surveys, tokenizer)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this recipe; redirect it to a file to change it: > my.yaml", show_default=False),
    ] = None,
) -> None:
    """List the recipes that ship with drkl, or print one of them."""
    from drkl.recipes import find_recipe, recipe_names
    from drkl.runs import read_text

    if name is not None:
        print(read_text(find_recipe(name)), end="")
        return
    known = recipe_names()
    width = max(map(len, known))
    for recipe, description in known.items():
        print(f"{recipe:{width}}  {description}")


@app.command()
def toy(
    output: Annotated[
        Path, typer.Option(help="Folder for csv files, figures and animations; finished results in it are kept.")
    ],
    setting: Annotated[str, typer.Option(help="free, capacity, or both, separated by a comma.")] = "free,capacity",
    vocab: Annotated[int, typer.Option(help="Vocabulary size.")] = 1000,
    entropy: Annotated[str, typer.Option(help="Entropies of the teachers, in nats.")] = "4.15,1.4",
    init: Annotated[str, typer.Option(help="random, warm (after some forward KL), or both.")] = "random",
    objectives: Annotated[
        str | None,
        typer.Option(
            help="Objectives, e.g. rkl,drkl:0.1,drkl@student,rkl+gjs:0.5. Default: all, and more.", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 5,
    steps: Annotated[int, typer.Option(help="Number of Adam steps.")] = 400,
    contexts: Annotated[
        int | None,
        typer.Option(min=1, help="Number of positions (default: free 32, capacity 192).", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the student's logits in capacity; the teacher's is 64.")] = 8,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use a small size in place of --vocab, --seeds, --steps and --contexts.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Number of single-thread processes (default: one per core).", show_default=False),
    ] = None,
) -> None:
    """Train toy students of a known teacher with every objective, and show their paths and end points."""
    from drkl.objectives.variants import parse_variants
    from drkl.toy import sweep
    from drkl.toy.dynamics import INITS, QUICK, SETTINGS, ToySetting
    from drkl.toy.figures import draw

    sizes: dict[str, Any] = {"vocab": vocab, "steps": steps, "contexts": contexts or 0, "rank": rank}
    if quick:
        sizes |= QUICK
        seeds = 2
    settings = [
        ToySetting(kind, entropy=nats, init=start, **sizes)
        for kind in _words("--setting", setting, SETTINGS)
        for nats in _floats("--entropy", entropy)
        for start in _words("--init", init, INITS)
    ]
    variants = parse_variants(sweep.DEFAULT_OBJECTIVES if objectives is None else _split("--objectives", objectives))
    with progress_bars() as on_progress:
        rows = sweep.sweep(
            settings, variants, range(seeds), output, jobs=jobs or os.cpu_count() or 1, on_progress=on_progress
        )
    ends = sweep.ends(rows)
    print_toy(ends)
    draw(rows, ends, settings, output)
    print(
        f"Written: {output / 'toy.csv'}, {output / 'ends.csv'}, a figure and an animation of each setting, and a map "
        "(map-SETTING.svg) where there are several entropies, starts or gammas."
    )


def _split(option: str, text: str) -> list[str]:
    """The parts of a comma-separated option, without repetitions."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise DrklError(f"{option} is {text!r}; expected one value, or several with commas between.")
    return list(dict.fromkeys(parts))


def _floats(option: str, text: str) -> list[float]:
    parts = _split(option, text)
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise DrklError(f"{option} is {text!r}; expected numbers with commas between, as 4.15,1.4.") from None


def _words(option: str, text: str, known: Sequence[str]) -> list[str]:
    words = _split(option, text)
    for word in words:
        if word not in known:
            expected = f"expected one or more of {', '.join(known)}.{did_you_mean(word, known)}"
            raise DrklError(f"{option} has {word!r}; {expected}")
    return words


@app.command()
def objectives(
    output_format: Annotated[str, typer.Option("--format", help="text, or md (the table of the docs)")] = "text",
) -> None:
    """List the objectives: name, formula, parameters with defaults, source."""
    from drkl.objectives import describe

    if output_format not in ("text", "md"):
        raise DrklError(f"--format is {output_format!r}; expected text or md.")
    print(describe.as_markdown() if output_format == "md" else describe.as_text())


@app.command(name="config")
def config_command() -> None:
    """List every key of a config with its default and its meaning."""
    from drkl.config import describe_keys

    for key, default, meaning in describe_keys():
        print(f"{key}  [{default}]\n    {meaning}")


if __name__ == "__main__":
    main()
