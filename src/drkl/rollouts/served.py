"""The student as a folder that a server loads: merged, and with a head of its own."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drkl.disk import writing
from drkl.errors import DrklError
from drkl.models.adapter import merge_adapter
from drkl.models.forward import is_encoder_decoder
from drkl.rollouts.config import RolloutsConfig

SERVED_NAME = "student"
"""What `rollout-server` calls the model."""
INSTALL = (
    "pip install vllm in an environment of its own (it pins torch and transformers), and name its executable: "
    "PATH/bin/vllm. docs/vllm.md says how, on a CPU too."
)


def served_folder(config: RolloutsConfig, run: Path) -> Path:
    """The folder through which the weights of a run go to its server.

    By default it stands beside the run's own folder, which must not exist before the run.
    """
    if config.server_folder is not None:
        return Path(config.server_folder)
    whole = run.resolve()  # of one that is named by a dot
    return whole.with_name(f"{whole.name}-rollout-server")


def check_servable(student: PreTrainedModel) -> None:
    """Raise DrklError for a student that is not served in the way that drkl knows."""
    if is_encoder_decoder(student):
        raise DrklError(
            "rollout_generator is 'vllm', and the student is an encoder-decoder, which vLLM does not serve. Use "
            "rollout_generator='builtin'."
        )
    if getattr(student, "hf_quantizer", None) is not None:
        raise DrklError(
            "rollout_generator is 'vllm', and the student is quantised; its weights cannot be sent to a server as "
            "plain numbers. Use rollout_generator='builtin', or a student that is not quantised."
        )


def served_copy(student: PreTrainedModel, adapter: Any = None) -> PreTrainedModel:
    """Return a copy in the processor's memory: an adapter merged, and the head a tensor of its own.

    A server that shares one tensor between embeddings and head may keep a packed copy of the head that new weights do
    not reach: vLLM 0.32 does on a CPU.

    Args:
        student: stays as it is.
        adapter: peft's handle on it, where it has an adapter.

    Raises:
        DrklError: weights that are spread over processes, or an adapter that cannot be merged.
    """
    whole: Any = student if adapter is None else adapter
    memo: dict[int, Any] = {}
    for tensor in chain(whole.parameters(), whole.buffers()):
        if type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
            raise DrklError(
                "rollout_generator is 'vllm', and the student's weights are spread over processes (FSDP), so no "
                "process can send them. Use rollout_generator='builtin', or train without FSDP."
            )
        memo[id(tensor)] = _on_cpu(tensor)
    copied = copy.deepcopy(whole, memo)
    model: PreTrainedModel = copied if adapter is None else merge_adapter(copied)
    _untie(model)
    return model


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy without a gradient."""
    data = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data


def _untie(model: PreTrainedModel) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    names = {name for name, module in model.named_modules() if module is head}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {k: v for k, v in tied.items() if k.removesuffix(".weight") not in names}


def write_served(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a whole model into a folder, which is there either complete or not at all.

    Args:
        model: as `served_copy` returns it.
        tokenizer: goes with it, so that the folder can be served by itself.
        folder: replaced where it exists.

    Raises:
        DrklError: it cannot be written.
    """
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    then = "go on; or set rollout_server_folder to another folder that this program and the server both see"
    with writing(folder, what="the student's weights for the server", then=then):
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            for path in new.iterdir():
                path.chmod(0o644)  # safetensors writes files that their owner alone reads; the server may be another
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def serve_command(
    vllm: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_model_len: int | None,
    host: str,
    port: int,
    more: Sequence[str] = (),
) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves a student's folder, and the variables that it needs beside the environment's own.

    Args:
        vllm: the executable.
        folder: as `write_served` makes it.
        dtype: the precision of the server.
        max_model_len: tokens of the longest prompt and its answer; None for the model's own context.
        host: address to listen at.
        port: likewise.
        more: further flags, which may overrule these.
    """  # fmt: skip
    flags = {
        "served-model-name": SERVED_NAME, "host": host, "port": str(port), "dtype": str(dtype).removeprefix("torch."),
        # Of the folder's generation_config nothing may change how the student is sampled.
        "generation-config": "vllm",
    }  # fmt: skip
    if max_model_len is not None:
        flags["max-model-len"] = str(max_model_len)
    command = [vllm, "serve", str(folder), *(word for name, value in flags.items() for word in (f"--{name}", value))]
    # The routes for new weights exist in this mode only.
    return [*command, *more], {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
