"""Map the arguments of TRL's `DistillationTrainer` and `GKDTrainer` (TRL 1.16) to drkl's, or refuse them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drkl.client import address_of
from drkl.errors import DrklError

RENAMED = {
    "max_completion_length": "rollout_max_new_tokens",
    "max_new_tokens": "rollout_max_new_tokens",
    "top_p": "rollout_top_p",
    "lmbda": "rollout_share",
    "seq_kd": "rollout_source",
    "use_vllm": "rollout_generator",
    "vllm_server_base_url": "rollout_server",
    "vllm_server_host": "rollout_server",
    "vllm_server_port": "rollout_server",
    "vllm_server_timeout": "rollout_server_timeout",
}
"""TRL's names of what drkl calls otherwise."""
_WITH_CODE = "drkl never runs code that comes with a model"
_SAMPLING = (
    "answers are sampled from the whole distribution, or from the part of it that rollout_top_p leaves, at "
    "rollout_sampling_temperature"
)
_OF_SERVER = "it is an option of the vLLM server, which is a program of its own here: `vllm serve` takes it"
_NO_TOOLS = "a sampled answer is one turn of plain text and calls no tools"
_TEXTS_KEPT = (
    "rollouts.jsonl in the run folder keeps answers to held-out prompts of every evaluation, as many as "
    "rollout_keep_texts says"
)
_ONE_ANSWER = "a prompt is answered once in each pass over the rows"
_TOKENIZER = "set it in the tokenizer that is passed as processing_class"
_ROWS = "rows are tokenised, cut to max_tokens and put into batches of like length by drkl itself"
_SERVED_TEACHER = "a teacher behind a server is passed as teacher_model=drkl.ServedTeacher(server, model, top_k=64)"
_TOP_K = "top_k of drkl.ServedTeacher, or a cache of kind topk, is that; all other tokens are always one class more"
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "top_k": (_SAMPLING, (None, -1, 0)),
    "min_p": (_SAMPLING, (0.0, None)),
    "repetition_penalty": (_SAMPLING, (None, 1.0)),
    "generation_kwargs": (_SAMPLING, ({}, None)),
    "cache_implementation": ("the built-in sampler has a cache of its own", (None,)),
    "ds3_gather_for_generation": ("the built-in sampler needs the weights whole", (None, True)),
    "vllm_model_impl": (_OF_SERVER, (None, "vllm")),
    "vllm_enable_sleep_mode": (_OF_SERVER, (None, False)),
    "vllm_structured_outputs_regex": ("the student answers freely; a pattern would train another model", (None,)),
    "vllm_group_port": ("weights reach the server through a folder, rollout_server_folder", (None, 51216)),
    "vllm_gpu_memory_utilization": (f"{_OF_SERVER} as --gpu-memory-utilization", (None, 0.3)),
    "vllm_max_model_length": (f"{_OF_SERVER} as --max-model-len", (None,)),
    "vllm_tensor_parallel_size": (f"{_OF_SERVER} as --tensor-parallel-size", (None, 1)),
    "max_tool_calling_iterations": (_NO_TOOLS, (None,)),
    "log_completions": (_TEXTS_KEPT, (None, False)),
    "num_completions_to_print": (_TEXTS_KEPT, (None,)),
    "log_unique_prompts": (_TEXTS_KEPT, (None, False)),
    "chat_template_kwargs": ("a row has them here, in a column of that name; or set template", ({}, None)),
    "trust_remote_code": (_WITH_CODE, (None, False)),
    "shuffle_dataset": ("the rows are shuffled in every epoch, by the seed", (None, True)),
    "pad_to_multiple_of": ("a batch is padded to its longest row", (None, "auto")),
    # Of GKDConfig, which is an SFTConfig.
    "max_length": ("max_tokens counts prompt and response, max_prompt_tokens the prompt alone", (None,)),
    "max_prompt_length": ("it is max_prompt_tokens here", (None,)),
    "truncation_mode": (_ROWS, (None, "keep_start")),
    "packing": (_ROWS, (None, False)),
    "packing_strategy": (_ROWS, (None, "bfd")),
    "eval_packing": (_ROWS, (None, False)),
    "dataset_kwargs": (_ROWS, ({}, None)),
    "dataset_num_proc": (_ROWS, (1, None)),
    "dataset_text_field": ("the column of a text is called text", (None, "text")),
    "completion_only_loss": ("the loss is that of the responses; a text alone is all response", (True, None)),
    "assistant_only_loss": ("turns='all' learns every turn of the assistant, turns='last' its last one", (None, False)),
    "loss_type": ("the objective is the loss; kd_weight adds a cross-entropy", (None, "nll")),
    "router_aux_loss_coef": ("the objective is the whole loss; kd_weight adds a cross-entropy", (0.0, None)),
    "activation_offloading": ("activation_checkpointing saves memory here", (None, False)),
    "chat_template_path": ("template is the jinja text itself, or the name of a template", (None,)),
    "eos_token": (_TOKENIZER, (None,)),
    "pad_token": (_TOKENIZER, (None,)),
    # Of TRL's other trainers.
    "num_generations": (_ONE_ANSWER, (None, 1)),
    "num_generations_eval": (_ONE_ANSWER, (None, 1)),
    "steps_per_generation": ("rollout_refresh_every counts the steps that one set of answers serves", (1, None)),
    "num_iterations": ("rollout_refresh_every and rollout_replay use an answer later, or again", (None, 1)),
    "vllm_sync_frequency": ("rollout_refresh_every counts the steps between two", (None, 1)),
    "generation_batch_size": ("rollout_batch_size is the number of answers that are written at once", (None,)),
    "use_teacher_server": (_SERVED_TEACHER, (None, False)),
    "teacher_model_server_url": (_SERVED_TEACHER, (None,)),
    "loss_top_k": (_TOP_K, (None, 0)),
    "loss_add_tail": (_TOP_K, (None, True)),
}  # fmt: skip
"""By name: why it is refused, and the values that ask for nothing and are taken."""


def translate(arguments: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments of a config with TRL's under their names here, and without those that ask nothing.

    Raises:
        DrklError: one of TRL's that asks for something drkl does not do, or says what another argument says too.

    >>> translate({"max_completion_length": 64, "use_vllm": False, "top_k": 0}, [])
    {'rollout_generator': 'builtin', 'rollout_max_new_tokens': 64}
    """
    kept, asked = {}, {}
    for name, value in arguments.items():
        if name in known or name not in (*REFUSED, *RENAMED, "vllm_mode"):
            kept[name] = value
        elif name in REFUSED:
            _check_nothing(name, value)
        elif value is not None:
            asked[name] = value
    for source, (target, value) in (*_answers(asked), *_vllm(asked), *_writer(asked)):
        if target in kept:
            raise DrklError(f"{source} is TRL's name for {target}, which is given already; give one of the two.")
        kept[target] = value
    return kept


Translated = list[tuple[str, tuple[str, Any]]]
"""TRL's name, and with it the name here and the value."""


def _check_nothing(name: str, value: Any) -> None:
    why, nothing = REFUSED[name]
    if not any(value is none or (type(value) is not bool and value == none) for none in nothing):
        raise DrklError(f"{name}={value!r} is TRL's, and not taken here: {why}. Leave it out.")


def _vllm(asked: dict[str, Any]) -> Translated:
    """Where answers come from; TRL reads its settings of a server in its mode ``server`` alone."""
    use, mode = asked.get("use_vllm"), asked.get("vllm_mode")
    if not isinstance(use, bool | None):
        raise DrklError(f"use_vllm is {use!r}; expected True or False.")
    if mode not in (None, "server", "colocate"):
        raise DrklError(f"vllm_mode is {mode!r}; expected 'server'.")
    if use and mode == "colocate":
        raise DrklError(
            "vllm_mode='colocate' is TRL's, and not taken here: vLLM runs as a server, which this program gives the "
            "student's weights. Start one with `drkl rollout-server CONFIG`, and name it in rollout_server."
        )
    found: Translated = []
    if use is not None:
        found.append(("use_vllm", ("rollout_generator", "vllm" if use else "builtin")))
    if "vllm_server_timeout" in asked:
        found.append(("vllm_server_timeout", ("rollout_server_timeout", asked["vllm_server_timeout"])))
    host, port = asked.get("vllm_server_host", "0.0.0.0"), asked.get("vllm_server_port", 8000)
    is_set = (host, port) != ("0.0.0.0", 8000)
    if "vllm_server_base_url" in asked:
        found.append(("vllm_server_base_url", ("rollout_server", asked["vllm_server_base_url"])))
    elif is_set or (use and mode == "server"):
        name = next((n for n in ("vllm_server_host", "vllm_server_port") if n in asked), "vllm_mode")
        # A server listens on 0.0.0.0, that is on every address; a client asks one of them.
        address = address_of({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host)), port)
        found.append((name, ("rollout_server", address)))
    return found


def _writer(asked: dict[str, Any]) -> Translated:
    """GKD's two numbers: a batch is the student's with probability ``lmbda``, else the teacher's or the data's."""
    share, teacher = asked.get("lmbda"), asked.get("seq_kd", False)
    if not isinstance(teacher, bool):
        raise DrklError(f"seq_kd is {teacher!r}; expected True or False.")
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1):
        raise DrklError(f"lmbda is {share!r}; expected a number in [0, 1].")
    if not teacher or share == 1:
        return [] if share is None else [("lmbda", ("rollout_share", share))]
    if not share:
        shares: Translated = [] if share is None else [("lmbda", ("rollout_share", 1.0))]
        return [("seq_kd", ("rollout_source", "teacher")), *shares]
    raise DrklError(
        f"seq_kd=True and lmbda={share!r} mean in TRL that the student writes some of the answers and the teacher all "
        "others; here one of them writes, and other rows keep the data's responses. Give lmbda=0 for the teacher's "
        "answers alone, or leave seq_kd out; rollout_source='mixed' mixes the two token by token."
    )


def _answers(asked: dict[str, Any]) -> Translated:
    names = ("max_completion_length", "max_new_tokens", "top_p")
    return [(name, (RENAMED[name], asked[name])) for name in names if name in asked]


def notes(arguments: dict[str, Any], config: Any) -> list[str]:
    """What TRL does with these arguments of a config and drkl does not, a sentence each.

    Args:
        arguments: as they were given.
        config: the `DistillationConfig` made of them.
    """
    default = type(config)
    asked = [
        name
        for name, target in RENAMED.items()
        if arguments.get(name) is not None and getattr(config, target) != getattr(default, target)
    ]
    if not asked:
        return []
    if not config.rollouts.is_on:
        if "lmbda" in arguments or "rollout_share" in arguments:
            return []
        return [
            f"rollout_share is 0, so that no answer is sampled and {', '.join(asked)} {has(asked)} no effect. "
            "TRL's DistillationTrainer samples every answer, as rollout_share=1.0 does here (GKDTrainer half: 0.5)."
        ]
    if config.temperature == 1 or "rollout_sampling_temperature" in arguments:
        return []
    return [
        f"temperature={config.temperature} divides the logits in the loss, and answers are sampled at "
        f"rollout_sampling_temperature={config.rollout_sampling_temperature}. TRL's DistillationTrainer uses the one "
        "number for both, its GKDTrainer for the sampling alone: set the two."
    ]


def has(names: Sequence[str]) -> str:
    """The verb that goes with so many names."""
    return "has" if len(names) == 1 else "have"


def in_words_of(error: DrklError, arguments: dict[str, Any]) -> DrklError:
    """The error with TRL's name for what it is about, where that was given."""
    field = str(error).split(" ")[0]
    given = [name for name, target in RENAMED.items() if target == field and arguments.get(name) is not None]
    return DrklError(f"{error} ({', '.join(given)} in TRL.)") if given else error


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
        raise DrklError(f"tools is TRL's, and not taken here: {_NO_TOOLS}. Leave it out.")
    reasons = {
        "data_collator": "drkl pads and aligns the rows itself",
        "compute_metrics": "drkl.evaluate measures a student",
        "compute_loss_func": "the objective is the loss: DistillationConfig(objective=your_function)",
        "model_init": "pass the model",
        "preprocess_logits_for_metrics": "drkl.evaluate measures a student",
        "reward_funcs": "the teacher's probabilities judge an answer, and no reward does",
        "rollout_func": "DistillationConfig(rollout_share=1.0) has the student write the answers",
        "formatting_func": "set template in DistillationConfig, or give rows with prompt and response",
    }
    for name in extra:
        why = f": {reasons[name]}" if name in reasons else ""
        raise DrklError(f"DistillationTrainer takes no argument {name!r}{why}.")
