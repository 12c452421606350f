"""What a cache stores at each position: a teacher's hidden states, or its k largest logits and the rest in sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from drkl.errors import DrklError
from drkl.losses import LMHead
from drkl.losses.topk import TopK
from drkl.models.readout import CHUNK, Batch, chunks
from drkl.objectives.closed_form import EXCLUDED

KINDS = ("hidden", "topk")
DEFAULT_K = 64
NO_ID = 65535
"""What stands for -1 among ids of 16 bits."""
_STATES = "states"


@dataclass(frozen=True)
class StoredStates:
    """Last hidden states; of a classifier its class logits."""

    width: int
    dtype: torch.dtype
    has_head: bool
    """Whether logits are made of the states; those of a classifier are its logits."""
    kind: ClassVar = "hidden"
    labelled: ClassVar = False

    @property
    def bytes_per_position(self) -> int:
        """Those of the values."""
        return self.width * self.dtype.itemsize

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"kind": self.kind, "width": self.width, "dtype": _name(self.dtype), "head": self.has_head}

    def tensors(self, states: Tensor) -> dict[str, Tensor]:
        """Tensors `[n, …]` for the values at `n` positions."""
        return {_STATES: states.cpu()}

    def restored(self, tensors: Mapping[str, Tensor], *, with_labels: bool) -> Tensor:
        """The values of such tensors."""
        del with_labels  # no label enters a hidden state
        return tensors[_STATES]

    def empty(self) -> Tensor:
        """The values at no position."""
        return torch.empty(0, self.width, dtype=self.dtype)

    def reader(self, teacher: Any) -> Callable[[Batch], dict[str, Tensor]]:
        """What makes the tensors of a batch."""
        return lambda batch: self.tensors(teacher.states(batch))


@dataclass(frozen=True)
class StoredTopK:
    """The k largest logits, and the log-sum-exp of all others at some temperatures.

    The observed token's logit is stored beside, whether it is among the k or not.
    """

    k: int
    temperatures: tuple[float, ...]
    vocab_size: int
    dtype: torch.dtype
    """The dtype of the teacher's weights."""
    kind: ClassVar = "topk"
    labelled: ClassVar = True

    @property
    def bytes_per_position(self) -> int:
        """Those of the values."""
        return self.k * (self._id_dtype.itemsize + 4) + 4 * (len(self.temperatures) + 1)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        facts = {"k": self.k, "temperatures": [*self.temperatures], "vocab_size": self.vocab_size}
        return {"kind": self.kind, **facts, "dtype": _name(self.dtype)}

    def tensors(self, found: TopK) -> dict[str, Tensor]:
        """Tensors `[n, …]` for the values at `n` positions."""
        assert found.label_logits is not None
        values = {"logits": found.logits, "log_rest": found.log_rest, "label_logits": found.label_logits}
        stored = {name: _without_infinity(value.float()).cpu() for name, value in values.items()}
        ids = found.ids.cpu()
        return stored | {
            "ids": (ids if self._id_dtype == torch.int32 else ids.masked_fill(ids < 0, NO_ID)).to(self._id_dtype)
        }

    def restored(self, tensors: Mapping[str, Tensor], *, with_labels: bool) -> TopK:
        """The values of such tensors; without labels nobody asks for their logits."""
        ids = tensors["ids"].long()
        values = {name: _with_infinity(tensors[name]) for name in ("logits", "log_rest", "label_logits")}
        return TopK(
            ids=ids if self._id_dtype == torch.int32 else ids.masked_fill(ids == NO_ID, -1),
            logits=values["logits"],
            log_rest=values["log_rest"],
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            label_logits=values["label_logits"] if with_labels else None,
        )

    def empty(self) -> TopK:
        """The values at no position."""
        return TopK(
            ids=torch.empty(0, self.k, dtype=torch.long),
            logits=torch.empty(0, self.k),
            log_rest=torch.empty(0, len(self.temperatures)),
            vocab_size=self.vocab_size,
            temperatures=self.temperatures,
            label_logits=torch.empty(0),
        )

    def reader(self, teacher: Any) -> Callable[[Batch], dict[str, Tensor]]:
        """What makes the tensors of a batch, of a teacher's states or of what it knows."""
        head = None if teacher.head is None else wide_head(teacher.head, self.vocab_size)

        def read(batch: Batch) -> dict[str, Tensor]:
            found = teacher.states(batch)
            if isinstance(found, Tensor):
                assert head is not None
                found = topk_of_states(found, head, batch.labels, k=self.k, temperatures=self.temperatures)
            return self.tensors(found)

        return read

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocab_size <= NO_ID else torch.int32


Stored = StoredStates | StoredTopK


def stored_in(manifest: Mapping[str, Any]) -> Stored | None:
    """What a manifest says is stored; None where it does not."""
    kinds: dict[str, dict[str, type]] = {
        "hidden": {"width": int, "dtype": str, "head": bool},
        "topk": {"k": int, "temperatures": list, "vocab_size": int, "dtype": str},
    }
    fields = kinds.get(str(manifest.get("kind")))
    if fields is None or not all(isinstance(manifest.get(name), kind) for name, kind in fields.items()):
        return None
    dtype = getattr(torch, manifest["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        return None
    if manifest["kind"] == "hidden":
        return StoredStates(manifest["width"], dtype, manifest["head"])
    temperatures = tuple(map(float, manifest["temperatures"]))
    return StoredTopK(manifest["k"], temperatures, manifest["vocab_size"], dtype)


def topk_to_store(
    k: int | None, temperatures: Sequence[float], vocab_size: int, dtype: torch.dtype, *, classifies: bool
) -> StoredTopK:
    """Check what a cache of kind topk is to have.

    Args:
        k: None is `DEFAULT_K`.
        temperatures: of the losses; 1 is always there too.
        vocab_size: the ids that student and teacher are compared on.
        dtype: of the teacher.
        classifies: whether the teacher is a classifier.

    Raises:
        DrklError: a number that cannot be, or a classifier.
    """
    if classifies:
        raise DrklError(
            "kind is 'topk', and the teacher is a classifier: its class logits are few, and a cache keeps all of them. "
            "Leave kind out, or set it to 'hidden'."
        )
    k = DEFAULT_K if k is None else k
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < vocab_size:
        raise DrklError(
            f"k is {k!r}; expected a whole number from 1 to {vocab_size - 1}, below the {vocab_size} ids that student "
            "and teacher are compared on. To keep all of them use kind 'hidden'."
        )
    return StoredTopK(k, tuple(sorted({1.0, *map(float, temperatures)})), vocab_size, dtype)


def check_kind(kind: str, k: int | None, temperatures: Sequence[float]) -> None:
    """Raise DrklError where there is no such kind, it has no such setting, or a temperature is none."""
    if kind not in KINDS:
        raise DrklError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
    known = isinstance(temperatures, (list, tuple))
    if not known or any(isinstance(t, bool) or not isinstance(t, (int, float)) for t in temperatures):
        raise DrklError(f"temperatures is {temperatures!r}; expected a list of numbers.")
    if bad := [t for t in temperatures if not 0 < t < math.inf]:
        raise DrklError(f"temperatures has {bad[0]!r}; expected finite numbers above 0.")
    if kind == "hidden" and (k is not None or temperatures):
        name = "k" if k is not None else "temperatures"
        raise DrklError(
            f"{name} goes with kind 'topk', and kind is 'hidden', which is exact at every temperature. Leave {name} "
            "out, or set kind to 'topk'."
        )


@torch.no_grad()
def topk_of_states(
    states: Tensor, head: LMHead, labels: Tensor | None, *, k: int, temperatures: Sequence[float]
) -> TopK:
    """The k largest logits of a teacher at some positions, a few positions at a time.

    Args:
        states: `[n, hidden]`.
        head: of `wide_head`.
        labels: `[n]`, the observed tokens; None where their logits are not asked for.
        k: how many.
        temperatures: at which the rest is summed.
    """
    parts = []
    for part in chunks(max(1, len(states)), CHUNK):
        own = None if labels is None else labels[part].to(states.device)
        parts.append(TopK.of_logits(head.logits(states[part]), k, temperatures, own))
    return TopK.cat(parts)


def wide_head(head: LMHead, vocab_size: int) -> LMHead:
    """A head of the first ``vocab_size`` ids, in fp32 or wider."""
    own = head.gathered().trimmed(vocab_size)
    wide = torch.promote_types(torch.float32, own.weight.dtype)
    bias = None if own.bias is None else own.bias.to(wide)
    return LMHead(own.weight.to(wide), bias, own.scale, own.softcap)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _without_infinity(values: Tensor) -> Tensor:
    """What is excluded as a finite number: whatever else is not finite is a fault."""
    return values.masked_fill(values == -math.inf, EXCLUDED)


def _with_infinity(values: Tensor) -> Tensor:
    return values.masked_fill(values <= EXCLUDED, -math.inf)
