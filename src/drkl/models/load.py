"""Load models, configs and tokenizers from a folder or the Hugging Face hub; safetensors only, no remote code."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from drkl.data.limits import bounded, no_panic
from drkl.errors import DrklError, did_you_mean
from drkl.kept import check_student
from drkl.models import smollm2
from drkl.models.adapter import adapter_base, adapter_revision, has_remade_start, read_adapter
from drkl.models.classes import check_classes, class_names, is_classifier, label_fields
from drkl.models.forward import is_encoder_decoder
from drkl.models.memory import LOADING, memory_told
from drkl.models.options import check_options
from drkl.models.precision import DtypeLike, resolve_dtype, torch_dtype
from drkl.models.settings import check_config, making
from drkl.models.weights import (
    check_index,
    check_stored_dtypes,
    check_weights,
    conversion_errors,
    file_faults,
    listed,
    own_report,
)
from drkl.runs import IN_MEMORY

Name = str | os.PathLike[str]
"""A folder, a Hugging Face id, or the embedded teacher's name."""

_NOWHERE = (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError)
_HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")
_UNREACHABLE = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError)
# Said, not left to the default: that asks on the terminal and waits.
_NO_CODE = {"trust_remote_code": False}
_NOT_TAKEN = {
    "trust_remote_code": "drkl never runs code that comes with a model",
    "use_safetensors": "models are loaded from safetensors only",
    "ignore_mismatched_sizes": "it would leave weights at random, unlike in every other process",
    "output_loading_info": "the report is read and checked already",
}
_TEXT = "Ein Übergang: 1,234.5 + (x_1)…\n\tdef f(): return [];  你好, мир! aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 4
"""A text of all kinds of characters; no tokenizer takes long for it."""
_log = logging.getLogger("drkl")


def quiet_transformers() -> None:
    """Leave the terminal to drkl's own progress; warnings of real errors still show."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def resolve_model(name: Name) -> str:
    """Return the folder of the embedded teacher (converted on first use) for its name; any other name unchanged."""
    return str(smollm2.ensure_converted()) if name == smollm2.NAME else _text(name)


def model_note(name: Name) -> str | None:
    """Return what a reader of results should know about a model, or None."""
    if name == smollm2.NAME or (Path(name).is_dir() and Path(name).resolve() == smollm2.converted_path().resolve()):
        return smollm2.NOTE
    return None


def load_model(model: Name | PreTrainedModel, dtype: DtypeLike = "auto", **options: Any) -> PreTrainedModel:
    """Load a language model, decoder-only or encoder-decoder as its config says, in eval mode, on the CPU.

    A folder with a LoRA adapter gives its base model with the adapter merged. Every weight comes from the files: where
    one is missing, has no place or another shape, or is no finite number, nothing is loaded.

    Args:
        model: ``smollm2-135m-instruct``, a local folder or a Hugging Face id; a model in memory is returned as it is.
        dtype: of the weights: a name (``fp32``, ``float32``, ``bf16``, ...), a ``torch.dtype``, or ``auto``: bf16
            where this machine's device is fast at it, else fp32. A model in memory has to have it already.
        options: further arguments of transformers' ``from_pretrained``, such as ``revision``, ``attn_implementation``
            or ``quantization_config``.

    Raises:
        DrklError: no such model, not a language model, no safetensors, weights that are not the model's, or an unknown
            dtype.
    """
    if isinstance(model, PreTrainedModel):
        return _in_memory(model, dtype, options)
    name, wanted = _checked(model), torch_dtype(dtype)
    options = _checked_options(options, name)
    if (base := adapter_base(name)) is not None:
        return _merged(name, base, wanted, options)

    def load(source: str) -> Any:
        config = _config(source, name, _hub_options(options))
        return _pretrained(_own_class(config) or model_class(config), source, name, options | {"dtype": wanted})

    loaded: PreTrainedModel = _load(name, "model", load)
    return loaded.eval()


def _merged(folder: str, base: str, dtype: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    """The base model of an adapter's folder with the adapter merged."""
    # Such a start is made again from the base, exactly in its own precision alone.
    base_dtype = torch.float32 if has_remade_start(folder) else dtype
    revision = {} if (commit := adapter_revision(folder)) is None else {"revision": commit}
    try:
        model = load_model(base, base_dtype, **(revision | dict(options)))
    except DrklError as error:
        raise DrklError(
            f"The adapter in {folder!r} needs its base model {base!r}, which cannot be loaded: {error} Where it lies "
            f"elsewhere now, set base_model_name_or_path in {str(Path(folder) / 'adapter_config.json')!r}."
        ) from error
    return read_adapter(model, folder).to(dtype).eval()


def _pretrained(
    family: Any, source: str, name: str, options: Mapping[str, Any], *, new_head: bool = False
) -> PreTrainedModel:
    """Call ``from_pretrained`` of a family and check that every weight came from the files."""
    settings = dict(options) | {"use_safetensors": True} | _NO_CODE
    if Path(source).is_dir():
        check_index(Path(source, options.get("subfolder") or ""))
    try:
        with own_report():
            # Other shapes are in the report too, which then has all of the names.
            model, report = family.from_pretrained(
                source, **settings, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except TypeError as error:
        if unknown := [key for key in options if f"argument {key!r}" in str(error)]:
            raise DrklError(
                f"from_pretrained takes no argument {unknown[0]!r} for {name!r}: {error}."
                f"{did_you_mean(unknown[0], _HUB_OPTIONS)}"
            ) from error
        raise
    if getattr(model, "_hf_peft_config_loaded", False):
        raise DrklError(
            f"{name!r} is an adapter, and adapters are read from a local folder only, so that every weight of theirs "
            f"can be checked: hf download {name} --local-dir FOLDER, then name that folder."
        )
    new = check_weights(model, report, name, new_head=new_head)
    if Path(source).is_dir() and "variant" not in options:
        check_stored_dtypes(model, source, options.get("subfolder") or "")
    if new:
        _log.warning(f"{name!r} has no head for these classes. New, and drawn at random: {listed(new)}.")
    return model


def load_classifier(
    model: Name | PreTrainedModel,
    dtype: DtypeLike = "auto",
    classes: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a text classifier in eval mode, on the CPU.

    Args:
        model: a local folder or a Hugging Face id; a model in memory is checked and returned as it is.
        dtype: as for `load_model`.
        classes: the names it has to have, by number; None for its own. A model without a head for classes gets a new
            one for these, at random, and a warning in the log says so.
        options: as for `load_model`.

    Raises:
        DrklError: no such model, no classifier where ``classes`` is None, other classes, weights that are not the
            model's, or an unknown dtype.
    """
    if isinstance(model, PreTrainedModel):
        name = type(model).__name__
        check_classes(model, class_names(model, name) if classes is None else classes, name)
        return _in_memory(model, dtype, options)
    name, wanted = _checked(model), torch_dtype(dtype)
    options = _checked_options(options, name)
    if adapter_base(name) is not None:
        raise DrklError(f"{name!r} is a LoRA adapter; a classifier has to be a whole model. Merge it first.")
    config = load_config(name, **options)
    if classes is None or is_classifier(config):
        check_classes(config, class_names(config, name) if classes is None else classes, name)
        fields = {}
    else:
        fields = label_fields(classes)

    def load(source: str) -> Any:
        settings = options | {"dtype": wanted} | fields
        return _pretrained(AutoModelForSequenceClassification, source, name, settings, new_head=bool(fields))

    loaded: PreTrainedModel = _load(name, "classifier", load)
    return loaded.eval()


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def _in_memory(model: PreTrainedModel, dtype: DtypeLike, options: Mapping[str, Any]) -> PreTrainedModel:
    if options:
        raise DrklError(
            f"{', '.join(options)}: options of loading, but the {type(model).__name__} is in memory already."
        )
    if dtype != "auto" and torch_dtype(dtype) != model.dtype:
        raise DrklError(
            f"The {type(model).__name__} in memory has weights of {model.dtype}, and the dtype asked for is "
            f"{resolve_dtype(dtype)}. Convert it first: model.to({torch_dtype(dtype)})."
        )
    return model


def without_weights(config: Any, dtype: torch.dtype, name: str, *, classifier: bool = False) -> PreTrainedModel:
    """A model on the meta device, in eval mode, for its config alone.

    Args:
        config: of the model; its dtype is set.
        dtype: that of the weights which are not here.
        name: the folder or id that it is known by; empty for none.
        classifier: whether it is a classifier.
    """
    config.dtype = dtype
    model = _without_memory(config, classifier)
    model.name_or_path = name
    made: PreTrainedModel = model.eval()
    return made


def model_class(config: Any, *, classifier: bool = False) -> Any:
    """The Auto class of classifiers, or of language models of this config's kind.

    Raises:
        DrklError: transformers has no such model of this kind.
    """
    kind = type(config)
    family: Any
    known: Any
    if classifier:
        family, known = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    # Decoders that also hear (Qwen2-Audio, Voxtral) are registered there, though no encoder reads their prompt.
    elif is_encoder_decoder(config) or (
        kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        family, known = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    else:
        family, known = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
    if kind not in known:
        raise DrklError(
            f"{config.name_or_path or 'The model'!r} has a {kind.__name__}, of which transformers has no "
            f"{family.__name__.removeprefix('Auto')}. "
            + (
                "Of a model that also reads images or sound, save the language model alone and name its folder."
                if config.get_text_config() is not config
                else "Use a model of another family."
            )
        )
    return family


def _own_class(config: Any) -> Any:
    """The language model of transformers that a config names where no Auto class knows it; None for others.

    Saved alone, the text models of Emu 3 and Llama 3.2 Vision have such a config.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return None
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if not isinstance(named, type) or not issubclass(named, GenerationMixin):
        return None
    return named if getattr(named, "config_class", None) is type(config) else None


def load_config(model: Name | PreTrainedModel, **options: Any) -> Any:
    """Load a model's config alone, for an adapter that of its base model; a model in memory gives its own.

    The embedded teacher's is read without converting its weights.

    Args:
        model: as for `load_model`.
        options: as for `load_model`; of these, the ones that say where the files lie, such as ``revision``.
    """
    options = _hub_options(options)
    if isinstance(model, PreTrainedModel):
        return model.config
    name = _checked(model)
    if (base := adapter_base(name)) is not None:
        revision = {} if (commit := adapter_revision(name)) is None else {"revision": commit}
        return load_config(base, **(revision | options))
    if name == smollm2.NAME and not smollm2.is_converted():
        config = AutoConfig.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF)
        return smollm2.clean_config(config)
    return _load(name, "config", lambda source: _config(source, name, options))


def _config(source: str, name: str, options: Mapping[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(source, **options, **_NO_CODE)
    check_config(config, name)
    return config


def load_tokenizer(tokenizer: Name | PreTrainedTokenizerBase, *, classifier: bool = False) -> Any:
    """Load a tokenizer, that of its base model for an adapter without one; one in memory is checked and returned.

    A tokenizer without a padding token is given its end-of-sequence token for that (masks never look at ids). A
    classifier writes nothing, so its tokenizer needs no end of sequence.

    Raises:
        DrklError: no such tokenizer, or one without an end of sequence or anything to pad with.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return _checked_tokenizer(tokenizer, tokenizer.name_or_path or type(tokenizer).__name__, classifier)
    name = _checked(tokenizer)
    if (base := adapter_base(name)) is not None and not any(Path(name).glob("tokenizer*.json")):
        return load_tokenizer(base, classifier=classifier)
    if name == smollm2.NAME and not smollm2.is_converted():
        loaded = AutoTokenizer.from_pretrained(smollm2.gguf_folder(), gguf_file=smollm2.GGUF)
    else:
        loaded = _load(name, "tokenizer", lambda source: AutoTokenizer.from_pretrained(source, **_NO_CODE))
    what = f"The tokenizer of {name!r}"
    with no_panic(what):
        bounded(("tokenizer", name), what, "Use another tokenizer.", lambda: words_of(loaded)(_TEXT, verbose=False))
    return _checked_tokenizer(loaded, name, classifier)


def source_of(model: PreTrainedModel) -> str:
    """The folder or id that a model's weights came from; empty for one that was made in memory."""
    name = str(getattr(model, "pruned_from", "") or model.name_or_path or "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def words_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def _checked_tokenizer(tokenizer: Any, name: str, classifier: bool) -> Any:
    if tokenizer.eos_token_id is None and not classifier:
        raise DrklError(
            f"The tokenizer of {name!r} has no end-of-sequence token, so a student could not learn to stop."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token_id is None:
        raise DrklError(f"The tokenizer of {name!r} has no padding token, and none of its own to pad with.")
    return tokenizer


def one_tokenizer(processing_class: Any, tokenizer: Any) -> Any:
    """Return what was passed under one of its two names, ``processing_class`` and ``tokenizer``.

    Raises:
        DrklError: two objects that differ.
    """
    if processing_class is not None and tokenizer is not None and processing_class is not tokenizer:
        raise DrklError("tokenizer and processing_class are two names for one thing; give one of them.")
    return processing_class if tokenizer is None else tokenizer


def count_parameters(config: Any, *, classifier: bool = False) -> int:
    """Parameters of a model of this config, tied weights once; no memory is used."""
    return sum(p.numel() for p in _without_memory(config, classifier).parameters())


def _without_memory(config: Any, classifier: bool) -> Any:
    """A model on the meta device."""
    family = model_class(config, classifier=classifier)
    with making(config), torch.device("meta"):
        return family.from_config(config)


def _text(name: Name) -> str:
    if not isinstance(name, str | os.PathLike):
        raise DrklError(
            "Expected a folder, a Hugging Face id, or an object of transformers (a PreTrainedModel, or a tokenizer); "
            f"got a {type(name).__name__}."
        )
    text = os.fspath(name)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _checked(name: Name) -> str:
    """The text of a name; where it is the folder of a run's student, its files are checked."""
    text = _text(name)
    check_student(text)
    return text


def _checked_options(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    check_options(options, f"The options of {name!r}")
    for key, value in options.items():
        if key in _NOT_TAKEN and value is not None and value is not (key == "use_safetensors"):
            raise DrklError(f"{name!r} is to be loaded with {key}={value!r}: {_NOT_TAKEN[key]}. Leave it out.")
        if str(value).startswith(IN_MEMORY):
            raise DrklError(
                f"{name!r} was loaded with {key} as an object ({value}), which a config.yaml cannot hold. Go on in "
                "Python, with the model in memory."
            )
    return {key: value for key, value in options.items() if key not in _NOT_TAKEN}


def _load(name: str, what: str, load: Callable[[str], Any]) -> Any:
    if name.startswith(IN_MEMORY):
        raise DrklError(
            f"The model was passed {name.replace(':', ',', 1)}, so it cannot be loaded again by a name. "
            "Measure the student in Python: drkl.evaluate(student, teacher, rows)."
        )
    source = resolve_model(name)
    if not Path(source).is_dir() and name.startswith((".", "/", "~")):
        raise DrklError(f"There is no folder {name!r} to load the {what} from.")
    try:
        with memory_told(f"as the {what} {name!r} is loaded, in the sizes that its config.json has", LOADING):
            return load(source)
    except DrklError:
        raise
    # Files that are missing, broken, foreign or hostile: whatever reading them makes a library raise.
    except Exception as error:
        # Options of the caller's own, and devices, are not about the files, and keep their own words.
        if "unexpected keyword argument" in str(error):
            raise
        if not isinstance(error, RuntimeError) or isinstance(error, RecursionError):
            raise _explained(name, what, error) from error
        if not (broken := conversion_errors(error)):
            raise
        raise DrklError(
            f"The weights of {name!r} are not those of its config.json: {len(broken)} cannot be put together from "
            f"their parts in the file, such as a layer's experts ({listed(broken)}). Some parts are missing, or have "
            "another shape. Save the model again whole."
        ) from error


def _explained(name: str, what: str, error: BaseException) -> DrklError:
    """A loader's error in its own words, after what they say about the place it was loaded from."""
    causes = list(_causes(error))
    folder = Path(name)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        where = f"Cannot read the {what} {name!r}"
    elif folder.is_dir():
        where = f"The folder {name!r} is there, but no usable {what} was found in it"
        if fault := file_faults(folder):
            return DrklError(f"The folder {name!r} holds no whole {what}: {fault}")
        if "safetensors" in reason and any(folder.glob("*.bin")):
            where += " (it has .bin weights; those are pickle files, convert them to safetensors first)"
    elif any(isinstance(cause, hub_errors.GatedRepoError) for cause in causes):
        where = f"The {what} {name!r} is gated on the hub: ask for access on its page, then log in with `hf auth login`"
    elif any(isinstance(cause, _NOWHERE + _UNREACHABLE) for cause in causes):
        reached = "" if any(isinstance(cause, _NOWHERE) for cause in causes) else ", which could not be reached"
        where = (
            f"There is no {what} {name!r}: looked for a folder of that name here, in the Hugging Face cache, and on "
            f"the hub{reached}. The embedded teacher is called {smollm2.NAME!r}"
        )
    else:
        where = f"Cannot load the {what} {name!r}"
    return DrklError(f"{where}. ({reason})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
