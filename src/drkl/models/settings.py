"""The settings that come with a model: a config that would have code run, or a model made without end, is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from drkl.errors import DrklError

MOST = 10_000
"""Layers, or experts of a layer: each is an object of its own, whatever its size."""
_COUNTS = re.compile("layer|expert|block|stage")


def check_config(config: Any, name: str) -> None:
    """Raise DrklError for a config that has no end, or that names code.

    Args:
        config: as transformers read it.
        name: of its model.

    Raises:
        DrklError: it names a kernel of the hub, has millions of layers, or a part that is no config.
    """
    for part in _parts(config):
        if not isinstance(part, PreTrainedConfig):
            raise DrklError(
                f"The config.json of {name!r} has a part that transformers does not read, a {type(part).__name__} in "
                "place of the settings of a model. Save the model again with its own version of transformers."
            )
        if "/" in str(part._attn_implementation):
            raise DrklError(
                f"The config.json of {name!r} has the attn_implementation {part._attn_implementation!r}, code on the "
                "hub: drkl never runs code that comes with a model. Remove that line."
            )
        for key, value in vars(part).items():
            if _COUNTS.search(key) and type(value) is int and value > MOST:
                raise DrklError(
                    f"The config.json of {name!r} says {key}: {value}; expected at most {MOST:,}. It is broken, or "
                    "made to fill the memory."
                )


def read_generation_config(place: str, **options: Any) -> GenerationConfig:
    """Read the settings of generation that lie beside a model.

    Args:
        place: its folder or id.
        options: of transformers, such as ``revision``.

    Raises:
        OSError: there are none.
        DrklError: they cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(place, **options)
    except OSError:
        raise
    except Exception as error:  # whatever a json text makes their code raise
        raise DrklError(
            f"The generation_config.json of {place!r} cannot be read: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}. Mend or remove it."
        ) from error


@contextmanager
def making(config: Any) -> Iterator[None]:
    """Name the config in what goes wrong as a model of it is made.

    Raises:
        DrklError: the config makes none.
    """
    try:
        yield
    except DrklError:
        raise
    except Exception as error:  # whatever a config.json makes a model's code raise
        name = config.name_or_path or type(config).__name__
        raise DrklError(
            f"The config of {name!r} makes no model: {type(error).__name__}: {' '.join(str(error).split())[:300]}. "
            "Mend its config.json, or save the model again."
        ) from error


def _parts(config: Any) -> Iterator[Any]:
    """The config, and those of its parts."""
    yield config
    if isinstance(config, PreTrainedConfig):
        text = config.get_text_config()
        if text is not config:
            yield text
        for name in config.sub_configs:
            if (part := getattr(config, name, None)) is not None and part is not text:
                yield part
