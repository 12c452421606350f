"""The ends that a model's own settings list, and those that a student is saved with."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel

from drkl.data.ends import as_ids, special_tokens
from drkl.data.seq2seq import languages, tokens_around
from drkl.data.template import stop_token_ids
from drkl.errors import DrklError
from drkl.models import smollm2
from drkl.models.adapter import adapter_base
from drkl.models.forward import decoder_start, is_encoder_decoder
from drkl.models.load import Name, load_config, resolve_model
from drkl.models.settings import read_generation_config

_PLACES = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip


def listed_ends(model: Name | PreTrainedModel, tokenizer: Any, **options: Any) -> list[int]:
    """Return the ids that end an answer by a model's own settings: those of its generation_config, or else config.

    The eos of a config alone is often nothing but its class's default, so of it special tokens count only.

    Args:
        model: in memory, or its name; then no weights are read.
        tokenizer: the one that goes with it.
        options: further arguments of loading; those that say where the files are count.
    """
    where = {name: options[name] for name in _PLACES if name in options}
    settings = model.generation_config if isinstance(model, PreTrainedModel) else _settings_of(model, where)
    ids = [token for token in as_ids(getattr(settings, "eos_token_id", None)) if token < len(tokenizer)]
    if _derived(settings):
        specials = set(special_tokens(tokenizer).values())
        ids = [token for token in ids if token in specials]
    return ids


def _settings_of(name: Name, options: dict[str, Any]) -> Any:
    """The generation_config of a folder or id (of an adapter its own, or its base's), or else its config."""
    if name == smollm2.NAME and not smollm2.is_converted():
        return load_config(name)  # converting takes a while, and the config says the same
    source = resolve_model(name)
    for place in (source, adapter_base(source)):
        try:
            if place is not None:
                return read_generation_config(place, **options)
        except OSError:  # none there
            continue
    return load_config(name, **options)


def _derived(settings: Any) -> bool:
    """Whether the settings are a config's, untouched."""
    if not isinstance(settings, GenerationConfig):
        return True
    return bool(getattr(settings, "_from_model_config", False)) and _untouched(settings)


def _untouched(settings: GenerationConfig) -> bool:
    """Whether the settings are what they were when they were loaded."""
    return bool(getattr(settings, "_original_object_hash", None) == hash(settings))


def stops_of(model: PreTrainedModel, tokenizer: Any, template: str = "auto", taught: Iterable[int] = ()) -> list[int]:
    """Return the ids that end an answer of this model: the template's end, eos, its own, and those of ``taught``.

    An encoder-decoder reads and writes plain texts, so that whatever ends a turn in a chat template is not among them.

    Raises:
        DrklError: nothing ends an answer.
    """
    own = listed_ends(model, tokenizer)
    if is_encoder_decoder(model):
        if ends := list(dict.fromkeys([*as_ids(tokenizer.eos_token_id), *own, *taught])):
            return ends
        raise DrklError(
            "The tokenizer has no eos token and the model's settings list none, so its answers could never end. Set "
            "the tokenizer's eos_token."
        )
    return list(dict.fromkeys([*stop_token_ids(tokenizer, template, own), *taught]))


def answer_start(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the tokens that every answer of an encoder-decoder begins with, which are given and not sampled.

    They are those that the tokenizer puts before each target (BART's ``<s>``, NLLB's language), and so stand first in
    the rows; where there are none, the forced_bos_token_id of the model's generation_config. Its forced_eos_token_id
    has no say: an answer that ``max_new_tokens`` cuts off did not end.
    """
    if not is_encoder_decoder(model):
        return []
    begin, _ = tokens_around(tokenizer, target=True)
    return begin or as_ids(model.generation_config.forced_bos_token_id)[:1]


def check_languages(tokenizer: Any, models: Mapping[str, PreTrainedModel | None]) -> None:
    """Raise DrklError where the tokenizer writes targets in another language than a model's decoder starts with.

    Args:
        tokenizer: the run's.
        models: by what an error calls them.
    """
    names = {number: code for code, number in reversed(languages(tokenizer).items())}
    if not names:
        return
    begin, after = tokens_around(tokenizer, target=True)
    written = next((token for token in (*begin, *after) if token in names), None)
    for whose, model in models.items():
        if model is None or not is_encoder_decoder(model):
            continue
        # NLLB and mBART-50 write the language first; mBART and PLBart after eos, and their decoder starts with it.
        key = "forced_bos_token_id" if written in begin else "decoder_start_token_id"
        started = model.generation_config.forced_bos_token_id if written in begin else decoder_start(model)
        if written is not None and started in names and started != written:
            raise DrklError(
                f"The tokenizer writes targets in {names[written]!r}, and the {whose} begins its answers in "
                f"{names[started]!r} ({key}). Set data.tgt_lang (in Python tokenizer.tgt_lang) to "
                f"{names[started]!r}, or {key} in the {whose}'s config."
            )


def set_ends(student: PreTrainedModel, tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """Make a student stop at ``ends`` by its own settings, which are saved with it and which every engine reads.

    What its generation_config lists already stays. Where transformers would refuse to save the other settings in
    there (a temperature without sampling), those are left out, unless they were loaded so: those are saved back.

    Args:
        student: its ``generation_config`` is replaced; in its config the ends alone are changed.
        tokenizer: the one that is saved with it.
        ends: the ids at which an answer of it is over.

    Returns:
        Notes for the user on settings that were left out.
    """
    if not student.can_generate():
        return []
    settings = copy.deepcopy(student.generation_config)
    as_loaded = _untouched(settings)
    all_ends = list(dict.fromkeys([*ends, *listed_ends(student, tokenizer)]))
    settings.eos_token_id = all_ends[0] if len(all_ends) == 1 else all_ends
    settings._from_model_config = None
    pad = as_ids(settings.pad_token_id)
    if not pad or pad[0] >= student.config.get_text_config(decoder=True).vocab_size:
        settings.pad_token_id = tokenizer.pad_token_id
    if is_encoder_decoder(student):
        begin, _ = tokens_around(tokenizer, target=True)
        if len(begin) == 1:  # what every target begins with, as the language of NLLB's and mBART-50's
            settings.forced_bos_token_id = begin[0]
    if as_loaded:  # transformers saves published settings that it would refuse otherwise; vLLM reads them
        settings._original_object_hash = hash(settings)
    student.generation_config, notes = _savable(settings)
    for config in (student.config, student.config.get_text_config(decoder=True)):
        _set_eos(config, all_ends)
    return notes


def _savable(settings: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Settings that transformers saves: these, or without the ones that make it refuse."""
    if _untouched(settings):
        return settings, []
    try:
        settings.validate(strict=True)
        return settings, []
    except ValueError as error:
        refused = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
    kept = settings.to_diff_dict()
    names = [name for name in kept if (name in refused if refused else name not in (*_TOKENS, "transformers_version"))]
    plain = GenerationConfig.from_dict({name: value for name, value in kept.items() if name not in names})
    note = (
        f"The student's generation_config has {', '.join(names)}, which transformers does not save beside the others; "
        "the saved student goes without. They had no effect on its answers."
    )
    return plain, [note]


def _set_eos(config: Any, ends: Sequence[int]) -> None:
    """Write the ends into a model config too, for programs that read no other file."""
    if not hasattr(config, "eos_token_id"):
        return
    if is_encoder_decoder(config):  # its classifier looks for the one eos of a text
        if not set(as_ids(config.eos_token_id)) & set(ends):
            config.eos_token_id = ends[0]
        return
    try:
        config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    except StrictDataclassError:  # a family whose config takes a single one
        config.eos_token_id = ends[0]
