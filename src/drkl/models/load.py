"""Models, configs and tokenizers by a folder or a Hugging Face id; safetensors only, no code from the model's side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import logging as transformers_logging

from drkl.errors import DrklError
from drkl.models import smollm2
from drkl.models.adapter import adapter_base, read_adapter
from drkl.models.classes import check_classes, class_names, is_classifier, label_fields
from drkl.models.forward import is_encoder_decoder
from drkl.models.precision import DTYPES

# What loading raises: files that are missing or broken, a config without its class, a tokenizer without its library,
# weights of another shape.
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# Said, not left to the default: that asks on the terminal and waits.
_NO_CODE = {"trust_remote_code": False}


def quiet_transformers() -> None:
    """Leave the terminal to drkl's own progress; warnings of real errors still show."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def resolve_model(name: str) -> str:
    """The embedded teacher's name becomes its folder (converted on first use); anything else stays."""
    return str(smollm2.ensure_converted()) if name == smollm2.NAME else name


def model_note(name: str) -> str | None:
    """What a reader of results has to know of a model, or None."""
    if name == smollm2.NAME or (Path(name).is_dir() and Path(name).resolve() == smollm2.converted_path().resolve()):
        return smollm2.NOTE
    return None


def load_model(name: str, dtype: str) -> PreTrainedModel:
    """Load a language model, decoder-only or encoder-decoder as its config says, in eval mode, on the CPU.

    A folder with a LoRA adapter gives the model it belongs to with the adapter merged.

    Args:
        name: ``smollm2-135m-instruct``, a local folder, or a Hugging Face id.
        dtype: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        DrklError: nowhere to be found, not a language model, or without safetensors.
    """

    if (base := adapter_base(name)) is not None:
        return read_adapter(load_model(base, dtype), name).eval()

    def load(source: str) -> Any:
        family = model_class(AutoConfig.from_pretrained(source, **_NO_CODE))
        return family.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True, **_NO_CODE)

    loaded: PreTrainedModel = _load(name, "model", load)
    return loaded.eval()


def load_classifier(name: str, dtype: str, classes: Sequence[str] | None = None) -> PreTrainedModel:
    """Load a text classifier in eval mode, on the CPU.

    Args:
        name: a local folder or a Hugging Face id.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        classes: the names it has to have, by number; None for its own. A model without a head for classes gets a new
            one for these, at random.

    Raises:
        DrklError: nowhere to be found, no classifier where ``classes`` is None, or one of other classes.
    """
    if adapter_base(name) is not None:
        raise DrklError(f"{name!r} is a LoRA adapter; a classifier has to be a whole model. Merge it first.")
    config = load_config(name)
    if classes is None or is_classifier(config):
        check_classes(config, class_names(config, name) if classes is None else classes, name)
        fields = {}
    else:
        fields = label_fields(classes)

    def load(source: str) -> Any:
        wanted = {"dtype": DTYPES[dtype], "use_safetensors": True} | fields | _NO_CODE
        return AutoModelForSequenceClassification.from_pretrained(source, **wanted)

    loaded: PreTrainedModel = _load(name, "classifier", load)
    return loaded.eval()


def model_class(config: Any, *, classifier: bool = False) -> Any:
    """The Auto class of classifiers, or of language models of this config's kind."""
    if classifier:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def load_config(name: str) -> Any:
    """Load a model's config alone, an adapter's model's too; the embedded teacher's is read without converting it."""
    if (base := adapter_base(name)) is not None:
        return load_config(base)
    if name == smollm2.NAME and not smollm2.is_converted():
        config = AutoConfig.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF)
        return smollm2.clean_config(config)
    return _load(name, "config", lambda source: AutoConfig.from_pretrained(source, **_NO_CODE))


def load_tokenizer(name: str, *, classifier: bool = False) -> Any:
    """Load a tokenizer; one without a padding token pads with its end of sequence (masks never look at ids).

    A classifier writes nothing, so its tokenizer needs no end of sequence.
    """
    if name == smollm2.NAME and not smollm2.is_converted():
        tokenizer = AutoTokenizer.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF)
    else:
        tokenizer = _load(name, "tokenizer", lambda source: AutoTokenizer.from_pretrained(source, **_NO_CODE))
    if tokenizer.eos_token_id is None and not classifier:
        raise DrklError(
            f"The tokenizer of {name!r} has no end-of-sequence token, so a student could not learn to stop."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token_id is None:
        raise DrklError(f"The tokenizer of {name!r} has no padding token, and none of its own to pad with.")
    return tokenizer


def count_parameters(config: Any, *, classifier: bool = False) -> int:
    """Parameters of a model of this config, tied weights once; no memory is used."""
    with torch.device("meta"):
        model = model_class(config, classifier=classifier).from_config(config)
    return sum(p.numel() for p in model.parameters())


def shared_tokens(student: Any, teacher: Any, student_name: str, teacher_name: str) -> tuple[int, bool]:
    """How many ids, from 0, mean the same token in two tokenizers, and whether one goes on where the other ends.

    Raises:
        DrklError: an id that means one token here and another there, or two tokenizers of which one is no beginning
            of the other.
    """
    theirs, ours = ({i: token for token, i in one.get_vocab().items()} for one in (teacher, student))
    if theirs == ours:
        return max(ours) + 1, False
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    # The ids that differ are all one tokenizer's, and come after all of the other's: tokens added at the end.
    if differ[0] and (differ[0] > max(ours) or differ[0] > max(theirs)):
        return differ[0], True
    first = ", ".join(f"{i}: student {ours.get(i)!r}, teacher {theirs.get(i)!r}" for i in differ[:3])
    raise DrklError(
        f"The vocabularies differ: the student {student_name!r} has {len(ours)} tokens, the teacher {teacher_name!r} "
        f"{len(theirs)} (first ids that differ: {first}). One batch feeds both models, so an id has to be one "
        "token to both; choose a student of the teacher's family."
    )


def _load(name: str, what: str, load: Callable[[str], Any]) -> Any:
    source = resolve_model(name)
    try:
        return load(source)
    except _FAILURES as error:
        raise _not_found(name, what, error) from error


def _not_found(name: str, what: str, error: Exception) -> DrklError:
    folder = Path(name)
    reason = " ".join(str(error).split())
    if folder.is_dir():
        where = f"The folder {name!r} is there, but no usable {what} was found in it"
        if "safetensors" in reason and any(folder.glob("*.bin")):
            where += " (it has .bin weights; those are pickle files, convert them to safetensors first)"
    elif name.startswith((".", "/", "~")):
        where = f"There is no folder {name!r}"
    else:
        where = (
            f"There is no {what} {name!r}: looked for a folder of that name here, in the Hugging Face cache, and on "
            f"the hub. The embedded teacher is called {smollm2.NAME!r}"
        )
    return DrklError(f"{where}. ({reason[:300]})")
