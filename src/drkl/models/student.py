"""Make a student: prune a model, load one, or initialise one from a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from drkl.errors import DrklError, did_you_mean
from drkl.models.classes import is_classifier, label_fields
from drkl.models.config import StudentConfig
from drkl.models.forward import decoder_start
from drkl.models.load import Name, load_classifier, load_config, load_model, model_class
from drkl.models.precision import DtypeLike, torch_dtype
from drkl.models.prune import pruned
from drkl.models.shorten import Build, lengthened, shortened, stacks_of


def make_student(
    config: StudentConfig,
    teacher_name: str | None,
    seed: int,
    tokenizer: Any = None,
    classes: Sequence[str] | None = None,
) -> PreTrainedModel:
    """Make the student that a config describes; the same config and seed give the same weights.

    Args:
        config: the ``student`` section.
        teacher_name: the model to prune, or to scale, where ``config.model`` is left out.
        seed: random seed for random weights, and for the new head of a model that was no classifier.
        tokenizer: the run's; gives the vocabulary of a student that is made from its config alone.
        classes: the names of a classifier's classes, by number; None for a language model.

    Raises:
        DrklError: no model to start from, layers that it does not have, or other classes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = _make(config, teacher_name, tokenizer, classes)
    if classes is not None and tokenizer is not None:
        student.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # decoders find a text's end by it
    return student.eval()


def _make(
    config: StudentConfig, teacher_name: str | None, tokenizer: Any, classes: Sequence[str] | None
) -> PreTrainedModel:
    if config.init == "random":
        model_config = student_config(config, teacher_name, tokenizer, classes)
        family = model_class(model_config, classifier=classes is not None)
        student: PreTrainedModel = family.from_config(model_config, dtype=torch_dtype(config.dtype))
        return student
    source = source_model(config, teacher_name)
    options = config.model_init_kwargs
    if classes is None:
        base = load_model(source, config.dtype, **options)
    else:
        base = load_classifier(source, config.dtype, classes, **options)
    return base if config.init == "pretrained" else pruned(base, *_kept(config, base.config))


def source_model(config: StudentConfig, teacher_name: str | None) -> str:
    """Return the name of the model that a student starts from."""
    if config.model is None and config.init == "pretrained":
        raise DrklError("student.init is 'pretrained', but student.model names no model.")
    source = config.model or teacher_name
    if source is None:
        raise DrklError(f"student.init is {config.init!r} and there is no teacher; name a model in student.model.")
    return source


def student_config(
    config: StudentConfig,
    teacher_name: str | None,
    tokenizer: Any = None,
    classes: Sequence[str] | None = None,
) -> Any:
    """Return the model config of the student, without loading any weights."""
    if config.model_type is not None:
        return _own_config(config, config.model_type, teacher_name, tokenizer, classes)
    base = load_config(source_model(config, teacher_name), **config.model_init_kwargs)
    for key, value in (label_fields(classes) if classes is not None else {}).items():
        setattr(base, key, value)
    if config.init == "pretrained":
        return base
    kept = _kept(config, base)
    build = model_class(base, classifier=classes is not None).from_config
    if config.init == "prune":
        return shortened(base, *kept, build=build)
    for key, value in config.config.items():
        if key in ("num_hidden_layers", *(stack.depth_key for stack in stacks_of(base))):
            raise DrklError(f"student.config has {key!r}; the number of layers stands in student.layers.")
        if not hasattr(base, key):
            raise DrklError(f"student.config has {key!r}, which {type(base).__name__} does not.")
        setattr(base, key, value)
    return _resized(base, *kept, build)


def _resized(base: Any, layers: list[int], encoder_layers: list[int] | None, build: Build) -> Any:
    """The config of a model with random weights: the layers' settings where they carry over, else the family's own."""
    kept = [layers] if encoder_layers is None else [layers, encoder_layers]
    if all(numbers[-1] < stack.available for numbers, stack in zip(kept, stacks_of(base), strict=True)):
        try:
            return shortened(base, layers, encoder_layers, build=build)
        except DrklError:
            pass
    return lengthened(base, *map(len, kept))


def _own_config(
    config: StudentConfig, model_type: str, teacher_name: str | None, tokenizer: Any, classes: Sequence[str] | None
) -> Any:
    """A model config from its fields alone; the vocabulary is the teacher's, else the tokenizer's."""
    assert tokenizer is not None, "a student of its own has the run's tokenizer"
    if model_type not in CONFIG_MAPPING:
        raise DrklError(
            f"student.config has model_type {model_type!r}, which transformers does not know; for instance gpt2, "
            f"llama, t5.{did_you_mean(model_type, CONFIG_MAPPING)}"
        )
    base = AutoConfig.for_model(model_type)
    fields = {key: value for key, value in config.config.items() if key != "model_type"}
    for key in fields:
        if key == "vocab_size":
            raise DrklError("student.config has vocab_size, which is the tokenizer's: set tokenizer.vocab_size.")
        if not hasattr(base, key):
            raise DrklError(
                f"student.config has {key!r}, which {type(base).__name__} does not.{did_you_mean(key, vars(base))}"
            )
    teacher = None if teacher_name is None else load_config(teacher_name)
    size = len(tokenizer) if teacher is None else teacher.get_text_config().vocab_size
    fields |= {"vocab_size": size, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields["pad_token_id"] = tokenizer.pad_token_id
    fields |= {} if classes is None else label_fields(classes)
    if base.is_encoder_decoder:
        start = tokenizer.pad_token_id if teacher is None else decoder_start(teacher)
        fields.setdefault("decoder_start_token_id", tokenizer.pad_token_id if start is None else start)
    try:
        config_of_model = AutoConfig.for_model(model_type, **fields)
        with torch.device("meta"):
            # Only the model itself refuses sizes that do not go together.
            model_class(config_of_model, classifier=classes is not None).from_config(config_of_model)
        return config_of_model
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError, AttributeError) as error:
        raise DrklError(f"student.config makes no {model_type}: {' '.join(str(error).split())[:300]}") from error


def _kept(config: StudentConfig, base: Any, section: str = "student.") -> tuple[list[int], list[int] | None]:
    """The layers of the decoder that stay, and those of the encoder where there is one; ``section`` is for errors."""
    decoder, *encoder = stacks_of(base)
    if not encoder:
        if config.encoder_layers is not None:
            raise DrklError(
                f"{section}encoder_layers is set, but {type(base).__name__} is a decoder-only model; {section}layers "
                "says which layers stay."
            )
        return kept_layers(config, decoder.available, section=section), None
    return (
        kept_layers(config, decoder.available, section=section),
        kept_layers(config, encoder[0].available, encoder=True, section=section),
    )


def depth(config: Any) -> int:
    """Return the number of layers; for an encoder-decoder half of those of both stacks together."""
    try:
        depths = [stack.available for stack in stacks_of(config)]
    except DrklError:  # a pretrained model of another family: good enough for an estimate
        depths = [config.get_text_config().num_hidden_layers]
    return max(1, sum(depths) // len(depths))


def kept_layers(
    config: StudentConfig, available: int, *, encoder: bool = False, section: str = "student."
) -> list[int]:
    """Return the layers that stay: those listed, or a number of them, first and last and the others evenly between."""
    own = encoder and config.encoder_layers is not None
    wanted, name = (config.encoder_layers, "encoder_layers") if own else (config.layers, "layers")
    whose = "encoder" if encoder else "model"
    if isinstance(wanted, list):
        if wanted[-1] >= available:
            raise DrklError(f"{section}{name} has layer {wanted[-1]}; the {whose} has layers 0 to {available - 1}.")
        return wanted
    count = max(1, available // 2) if wanted is None else wanted
    if count > available:
        if config.init == "random":
            return list(range(count))
        raise DrklError(f"{section}{name} is {count}; the {whose} has {available} layers.")
    if count == 1:
        return [0]
    return [round(i * (available - 1) / (count - 1)) for i in range(count)]


def prune(
    teacher: PreTrainedModel | Name,
    layers: int | Sequence[int] | None = None,
    encoder_layers: int | Sequence[int] | None = None,
    *,
    dtype: DtypeLike | None = None,
) -> PreTrainedModel:
    """Return a new model with some of the teacher's layers, as ``student.init: prune`` makes it.

    Embeddings, final norm and head are the teacher's, tied where they were tied. The teacher is left as it is.

    Args:
        teacher: a language model or a classifier in memory, a folder, or a Hugging Face id.
        layers: how many layers stay (the first, the last, the others evenly between), or their numbers from 0,
            ascending; default half. For an encoder-decoder these are the decoder's.
        encoder_layers: for an encoder-decoder, the encoder's likewise; default as ``layers``.
        dtype: the dtype to load a teacher in that is given by its name; default fp32.

    Raises:
        DrklError: layers that the teacher does not have, or a teacher that cannot be loaded or pruned.

    Example:
        >>> small = prune(teacher, layers=10)  # doctest: +SKIP
    """
    given = {"layers": layers, "encoder_layers": encoder_layers}
    wanted: dict[str, Any] = {name: list(v) if isinstance(v, Sequence) else v for name, v in given.items()}
    try:
        config = StudentConfig(init="prune", **wanted)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        raise DrklError(
            f"{name} is {wanted.get(name)!r}; expected a number of layers, at least 1, or layer numbers from 0, "
            "ascending, each once."
        ) from error
    if not isinstance(teacher, PreTrainedModel):
        load = load_classifier if is_classifier(load_config(teacher)) else load_model
        teacher = load(teacher, "fp32" if dtype is None else dtype)
    elif dtype is not None:
        load_model(teacher, dtype)  # refuses another dtype than its own
    with torch.random.fork_rng():  # the weights are drawn before they are replaced
        return pruned(teacher, *_kept(config, teacher.config, section=""), section="")
