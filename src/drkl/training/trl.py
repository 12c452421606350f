"""Map the arguments of TRL's `DistillationTrainer` and its config (TRL 1.16) to drkl's, or refuse them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drkl.errors import DrklError

_ON_POLICY = (
    "it is about completions that the student samples, and drkl trains on the completions of the data; on-policy "
    "distillation is not there yet"
)
_WITH_CODE = "drkl never runs code that comes with a model"
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(
        ("max_completion_length", "generation_kwargs", "cache_implementation", "max_tool_calling_iterations",
         "num_completions_to_print", "min_p", "vllm_structured_outputs_regex", "vllm_server_base_url",
         "vllm_max_model_length"),
        (_ON_POLICY, (None,)),
    ),
    **dict.fromkeys(
        ("use_vllm", "log_completions", "log_unique_prompts", "vllm_enable_sleep_mode"), (_ON_POLICY, (None, False))
    ),
    **dict.fromkeys(
        ("vllm_mode", "vllm_model_impl", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
         "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "ds3_gather_for_generation"),
        (_ON_POLICY, (None,)),
    ),
    "top_p": (_ON_POLICY, (None, 1.0)),
    "top_k": (_ON_POLICY, (None, 0)),
    "repetition_penalty": (_ON_POLICY, (None, 1.0)),
    "chat_template_kwargs": ("a row has them here, in a column of that name; or set template", (None,)),
    "trust_remote_code": (_WITH_CODE, (None, False)),
    "shuffle_dataset": ("the rows are shuffled in every epoch, by the seed", (None, True)),
    "pad_to_multiple_of": ("a batch is padded to its longest row", (None, "auto")),
    # Of TRL's other trainers.
    **dict.fromkeys(("lmbda", "seq_kd", "num_generations", "teacher_model_server_url", "use_teacher_server"),
                    (_ON_POLICY, (None, 0.0, False))),
    "max_length": ("it has two fields here: max_tokens, and max_prompt_tokens", (None,)),
    "max_prompt_length": ("it is max_prompt_tokens here", (None,)),
}  # fmt: skip
"""By name: why it is refused, and the values that ask for nothing and are taken."""


def translate(arguments: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments of a config without TRL's that ask for nothing.

    Raises:
        DrklError: one of TRL's that asks for something drkl does not do.
    """
    kept = {}
    for name, value in arguments.items():
        if name in known or name not in REFUSED:
            kept[name] = value
            continue
        why, nothing = REFUSED[name]
        if not any(value is none or (type(value) is not bool and value == none) for none in nothing):
            raise DrklError(f"{name}={value!r} is TRL's, and not taken here: {why}. Leave it out.")
    return kept


def objective_of(beta: float) -> tuple[str, dict[str, Any]]:
    """TRL's ``beta`` as an objective: its generalised Jensen-Shannon divergence has the KLs for its two ends.

    Raises:
        DrklError: a value outside [0, 1].

    >>> objective_of(0.0), objective_of(0.25)
    (('fkl', {}), ('gjs', {'beta': 0.25}))
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
        raise DrklError(f"beta is {beta!r}; expected a number in [0, 1]: 0 is the forward KL, 1 the reverse KL.")
    if beta in (0, 1):
        return ("rkl" if beta else "fkl"), {}
    return "gjs", {"beta": float(beta)}


def check_trainer_arguments(tools: Any, extra: dict[str, Any]) -> None:
    """Raise DrklError for an argument of the trainer that drkl does not take."""
    if tools:
        raise DrklError(f"tools is TRL's, and not taken here: {_ON_POLICY}. Leave it out.")
    reasons = {
        "data_collator": "drkl pads and aligns the rows itself",
        "compute_metrics": "drkl.evaluate measures a student",
        "compute_loss_func": "the objective is the loss: DistillationConfig(objective=your_function)",
        "model_init": "pass the model",
        "preprocess_logits_for_metrics": "drkl.evaluate measures a student",
        "reward_funcs": "nothing is sampled here",
        "formatting_func": "set template in DistillationConfig, or give rows with prompt and response",
    }
    for name in extra:
        why = f": {reasons[name]}" if name in reasons else ""
        raise DrklError(f"DistillationTrainer takes no argument {name!r}{why}.")
