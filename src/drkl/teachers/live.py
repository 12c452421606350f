"""A teacher model that runs during training, beside the student."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drkl.losses import LMHead
from drkl.models.check import check_forward
from drkl.models.classes import is_classifier
from drkl.models.forward import INPUTS, hidden_states, in_eval_mode, output_head, without_mask
from drkl.models.load import load_classifier, load_model
from drkl.models.memory import LOADING, memory_told
from drkl.models.precision import resolve_dtype
from drkl.models.readout import Batch
from drkl.models.sharded import is_sharded, shard_frozen
from drkl.models.weights import BrokenWeights, check_numbers
from drkl.processes import joined
from drkl.teachers.config import TeacherConfig
from drkl.teachers.shards import check_is_no_cache


class LiveTeacher:
    """A teacher's hidden states and output head (class logits of a classifier), on demand and without gradients.

    The model may be somebody else's: its training mode and its ``requires_grad`` flags are as before after every call.
    """

    k: int | None = None
    """How many logits are known at a position, with the others in sum; None for all."""

    def __init__(self, model: PreTrainedModel, remember_mb: int = 0) -> None:
        """
        Args:
            model: on its device.
            remember_mb: memory for the states of batches already seen, in MiB.

        Raises:
            DrklError: its weights are not finite, or its logits are not those of its head on its hidden states.
        """
        self.model = model
        check_numbers(model, f"The teacher, a {type(model).__name__},")
        if not is_classifier(model):
            check_forward(model)
        self.pad_id: int | None = None
        """What batches are padded with, where it is not the model's own: a decoder that classifies looks for it."""
        self._memory: dict[bytes, Tensor] = {}
        self._bytes_left, self._remembers = remember_mb * 2**20, remember_mb > 0
        self._is_sharded = is_sharded(model)

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device, *, classifier: bool = False) -> LiveTeacher:
        """Load the teacher of a config onto a device, or a part of it onto that of each process."""
        check_is_no_cache(config.model)
        load = load_classifier if classifier else load_model
        try:
            model = load(config.model, resolve_dtype(config.dtype, device), **config.model_init_kwargs)
        except BrokenWeights as error:
            raise BrokenWeights(f"The teacher {error}") from error
        with memory_told("as the teacher is put on its device", LOADING):
            return cls(placed(model, device, shard=config.shard), config.remember_mb)

    @property
    @torch.no_grad()
    def head(self) -> LMHead | None:
        """The output head, whole and detached; None for a classifier. Of a sharded teacher all processes ask for it."""
        head = output_head(self.model)
        return None if head is None else head.detached()

    @torch.no_grad()
    def hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the last hidden states `[batch, tokens, hidden]`, without dropout."""
        config = self.model.config.get_text_config()
        own = getattr(config, "pad_token_id", None)
        if self.pad_id is not None:
            config.pad_token_id = self.pad_id
        try:
            with in_eval_mode(self.model):
                return hidden_states(self.model, without_mask(self.model, batch))
        finally:
            if self.pad_id is not None:
                config.pad_token_id = own

    def states(self, batch: Batch) -> Tensor:
        """Return the states `[n, hidden]` at the positions that are read of some rows, as the teacher reads them."""
        device = next(self.model.parameters()).device
        read = batch.for_teacher
        inputs = {name: value.to(device) for name, value in read.inputs.items()}
        return self.hidden_at(inputs, read.keep.to(device), remember=False)

    def hidden_at(
        self, batch: Mapping[str, Tensor], keep: Tensor, *, labels: Tensor | None = None, remember: bool = True
    ) -> Tensor:
        """Return the last hidden states `[n, hidden]` at the positions where ``keep`` `[batch, tokens]` is true.

        The states of a batch are kept while they fit into ``remember_mb``. The same batch gives the same bits again,
        so remembering changes no result. ``remember=False`` is for batches that never come again. ``labels`` `[n]` are
        for teachers that know a few logits alone. A sharded teacher runs in all processes or in none: each of them
        calls this as often as the others.
        """
        del labels
        if not self._remembers:
            return self.hidden(batch)[keep]
        key = _digest(*(batch[name] for name in INPUTS if name in batch), keep) if remember else None
        known = None if key is None else self._memory.get(key)
        if self._all_have(known is not None, keep.device):
            assert known is not None
            return known.to(keep.device)
        states = self.hidden(batch)[keep]
        size = states.numel() * states.element_size()
        if key is not None and key not in self._memory and size <= self._bytes_left:
            self._bytes_left -= size
            self._memory[key] = states.cpu()
        return states

    def _all_have(self, found: bool, device: torch.device) -> bool:
        """Whether every process that the teacher is sharded over has found the states of its batch."""
        if not self._is_sharded:
            return found
        count = torch.tensor(int(found), device=device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MIN)
        return bool(count)


def placed(model: PreTrainedModel, device: torch.device, *, shard: bool = False) -> PreTrainedModel:
    """Put a teacher's weights where they are used.

    Args:
        model: as it was loaded. One that is sharded or spread over devices already stays as it is.
        device: of this process.
        shard: cut it over the processes, where there are several; in place.
    """
    if is_sharded(model):
        return model
    if shard and joined().count > 1:
        shard_frozen(model, device)
    elif getattr(model, "hf_device_map", None) is None:
        model.to(device)  # type: ignore[arg-type]
    return model


def _digest(*tensors: Tensor) -> bytes:
    """A key that differs for batches that differ in a shape or a value."""
    digest = hashlib.blake2b(str([list(tensor.shape) for tensor in tensors]).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()
