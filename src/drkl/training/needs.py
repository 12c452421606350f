"""Settings of a training that need a package, or that only the thing itself can judge; tried before all else."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from drkl.errors import DrklError, did_you_mean
from drkl.models.memory import is_out_of_memory, memory_told
from drkl.models.options import is_there
from drkl.training.fields import OF_LAYERS, default_of, names_in, optim_of, schedule_of

if TYPE_CHECKING:
    from drkl.training.arguments import DistillationConfig

_TRACKERS = {
    "azure_ml": (("azureml.core",), "azureml-core"), "comet_ml": (("comet_ml",), "comet-ml"),
    "mlflow": (("mlflow",), "mlflow"), "neptune": (("neptune",), "neptune"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"), "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"), "codecarbon": (("codecarbon",), "codecarbon"), "clearml": (("clearml",), "clearml"),
    "dagshub": (("dagshub",), "dagshub mlflow"), "flyte": (("flytekit",), "flytekit flytekitplugins-deck-standard"),
    "dvclive": (("dvclive",), "dvclive"), "swanlab": (("swanlab",), "swanlab"),
}  # fmt: skip
"""By the name in report_to: modules of which one has to be there, and what pip installs."""
_OPTIMIZERS = (
    (("adamw_torch_xla",), "torch_xla", "torch_xla"),
    (("adamw_torch_npu",), "torch_npu", "torch_npu"),
    (("adamw_anyprecision",), "torchdistx", "git+https://github.com/pytorch/torchdistx"),
    (("adamw_torch_4bit", "adamw_torch_8bit"), "torchao", "torchao"),
    (("galore_",), "galore_torch", "galore-torch"),
    (("apollo_",), "apollo_torch", "apollo-torch"),
    (("grokadamw",), "grokadamw", "grokadamw"),
    (("schedule_free_",), "schedulefree", "schedulefree"),
    (("stable_adamw",), "optimi", "torch-optimi"),
    (("adamw_bnb", "adamw_8bit", "ademamix", "lion_", "paged_", "rmsprop_bnb"), "bitsandbytes", "bitsandbytes"),
)  # fmt: skip
"""How the names of optimisers begin, the module that has them, and what pip installs."""
_OPTIM_ARGS = {
    "adamw_torch": (), "adamw_torch_fused": (), "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"), "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}  # fmt: skip
"""What the optimisers that torch brings read of optim_args."""
_SWITCHES = ("nesterov", "centered")
_TRIAL = (
    "as the settings of the training were tried on a few numbers",
    "There was room for nothing: end what else runs on this device, or use another one.",
)
"""When memory ran out, and what helps."""


def check_installed(args: DistillationConfig) -> None:
    """Raise DrklError, with the line that installs it, for a field that needs a package which is not there."""
    for name in names_in(args.report_to):
        _check_tracker(name)
    for begins, module, package in _OPTIMIZERS:
        if optim_of(args).startswith(begins):
            _check_package(f"optim is {optim_of(args)!r}", (module,), package)
            break
    if args.deepspeed:
        _check_package("deepspeed is given", ("deepspeed",), "deepspeed")
    if not args.skip_memory_metrics:
        _check_package("skip_memory_metrics is false", ("psutil",), "psutil")
    if "tpu_metrics_debug" in str(args.debug):
        _check_package("debug is 'tpu_metrics_debug'", ("torch_xla",), "torch_xla")


def _check_tracker(name: str) -> None:
    if name == "all":
        if not any(map(is_there, (m for modules, _ in _TRACKERS.values() for m in modules))):
            raise DrklError(
                "report_to is 'all', and no tracker is installed. Install one, for instance with `pip install "
                "tensorboard`, or leave report_to out: train.jsonl has every number."
            )
    elif name == "kubeflow":
        if "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
            raise DrklError(
                "report_to names 'kubeflow', and KUBEFLOW_TRAINER_SERVER_URL is not set, as Kubeflow does in its own "
                "jobs. Leave it out."
            )
    elif name in _TRACKERS:
        modules, package = _TRACKERS[name]
        _check_package(f"report_to names {name!r}", modules, package)
    else:
        known = [*_TRACKERS, "kubeflow"]
        raise DrklError(
            f"report_to names {name!r}, which transformers does not know.{did_you_mean(name, known)} It knows "
            f"{', '.join(known)}, all and none."
        )


def _check_package(what: str, modules: tuple[str, ...], package: str) -> None:
    if not any(map(is_there, modules)):
        raise DrklError(
            f"{what}, which needs {modules[0]}, and that is not installed. Install it with `pip install {package}`, or "
            "leave the setting out."
        )


def check_made(args: DistillationConfig) -> None:
    """Raise DrklError where the optimiser, its schedule, a loader of batches or a compiler refuses its settings.

    Args:
        args: after transformers has settled them.
    """
    _check_optim_args(args)
    if not optim_of(args).startswith(OF_LAYERS):
        with memory_told(*_TRIAL):
            optimizer = _try_optimizer(args)
        _tryschedule_of(args, optimizer)
    try:
        torch.utils.data.DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    except (ValueError, TypeError) as error:
        raise DrklError(f"dataloader_…: torch refuses the settings: {_one_line(error)}") from error
    if args.torch_compile:
        with memory_told(*_TRIAL):
            _try_compiler(str(args.torch_compile_backend), args.torch_compile_mode, args.device.type)


def _check_optim_args(args: DistillationConfig) -> None:
    known = _OPTIM_ARGS.get(optim_of(args))
    seen: list[str] = []
    for pair in (args.optim_args or "").replace(" ", "").split(",") if args.optim_args else []:
        name, equals, value = pair.partition("=")
        if not (equals and name and value) or name in seen:
            raise DrklError(
                f"optim_args is {args.optim_args!r}; expected pairs with commas between them, each name once, as "
                "'momentum=0.9,nesterov=true'."
            )
        seen.append(name)
        if known is not None and name not in known:
            takes = (
                f"it takes {', '.join(known)}"
                if known
                else "it takes none; learning_rate, weight_decay, "
                + ("adam_beta1, adam_beta2 and adam_epsilon are fields of their own")
            )
            raise DrklError(f"optim_args has {name!r}, which {optim_of(args)} does not read; {takes}.")
        if name in _SWITCHES and value.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise DrklError(f"optim_args has {pair!r}; expected {name}=true or {name}=false.")


def _try_optimizer(args: DistillationConfig) -> Any:
    """The optimiser of one weight, which has taken a step."""
    weight = nn.Parameter(torch.zeros(1))
    settled = copy.copy(args)
    settled.warmup_steps = args.get_warmup_steps(_steps(args))  # of which some make a schedule of their own
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settled, None)
        optimizer = kind([{"params": [weight], "weight_decay": args.weight_decay}], **options)
        weight.grad = torch.ones(1)
        optimizer.step()
    except Exception as error:  # of whichever package the optimiser is
        if is_out_of_memory(error):
            raise
        raise DrklError(f"The optimiser {optim_of(args)!r} refuses its settings: {_one_line(error)}") from error
    if not torch.isfinite(weight).all():
        raise DrklError(
            f"The optimiser {optim_of(args)!r} makes a weight {float(weight.detach())} in one step of a gradient of 1, "
            f"at a learning rate of {args.learning_rate:g}."
        )
    for names, option in ((("adam_beta1", "adam_beta2"), "betas"), (("adam_epsilon",), "eps")):
        given = [name for name in names if getattr(args, name) != default_of(name)]
        if given and (option not in options or (option == "eps" and options["eps"] != args.adam_epsilon)):
            raise DrklError(
                f"{given[0]} is {getattr(args, given[0])}, and {optim_of(args)} has no such number. Leave it out."
            )
    return optimizer


def _steps(args: DistillationConfig) -> int:
    """The number of steps, or one to try with where it follows from the rows."""
    return args.max_steps if args.max_steps > 0 else 10


def _tryschedule_of(args: DistillationConfig, optimizer: Any) -> None:
    steps, options = _steps(args), args.lr_scheduler_kwargs
    name = schedule_of(args)
    try:
        if not isinstance(options, dict | None):
            raise TypeError(f"lr_scheduler_kwargs is {options!r}; expected a mapping")
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        shape = getattr(schedule, "lr_lambdas", [lambda step: 1.0])[0]
        for step in sorted({0, 1, args.get_warmup_steps(steps), steps // 2, steps - 1}):
            if not (math.isfinite(rate := shape(step)) and rate >= 0):
                raise ValueError(f"after {step} steps the learning rate would be {rate * args.learning_rate}")
    except Exception as error:  # whatever a schedule makes of other settings than it expects
        set_by_drkl = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
        make: Any = TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]
        named = inspect.signature(make).parameters
        takes = ", ".join(other for other in named if other not in set_by_drkl)
        raise DrklError(
            f"The schedule {name!r} refuses its settings: {_one_line(error).rstrip('.')}. Set lr_scheduler_kwargs"
            + (f" ({takes})." if takes else ", or leave it out.")
        ) from error


@functools.cache
def _try_compiler(backend: str, mode: str | None, device: str) -> None:
    """Compile a function of one number, forward and backward, as a model is compiled."""
    try:
        number = torch.ones(4, device=device, requires_grad=True)
        torch.compile(lambda x: (x * 2).sin(), backend=backend, mode=mode)(number).sum().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DrklError(
            f"torch_compile is on (backend {backend!r}, mode {mode!r}), and torch.compile does not work here: "
            f"{_one_line(error)[:300].rstrip('.')}. The usual backend needs a C++ compiler. Mend that, or leave "
            "torch_compile out."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
