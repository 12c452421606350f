"""What a teacher thinks of answers: the negative log-likelihood of their tokens, in one forward pass over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from drkl.data.tokenize import Row
from drkl.evaluation.answers import Answer
from drkl.losses.common import log_softmax
from drkl.models.forward import lm_head
from drkl.models.readout import CHUNK, Readout, chunks, read
from drkl.positions import at
from drkl.processes import ALONE, Share


def nll_of_answers(
    teacher: PreTrainedModel,
    prompts: Sequence[Row],
    pools: Sequence[Sequence[Answer]],
    *,
    pad_id: int,
    begin: Sequence[int] = (),
    vocab_size: int | None = None,
    merged_ids: Sequence[int] = (),
    share: Share = ALONE,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """-log p of all tokens of each answer, in nats: a number for each, the answers of a prompt together.

    Args:
        teacher: on its device, in eval mode; a decoder-only model or an encoder-decoder.
        prompts: as the teacher reads them.
        pools: the answers to each prompt, with their tokens.
        pad_id: fills batches.
        begin: the tokens that an encoder-decoder's answers begin with, which were given and not sampled.
        vocab_size: how many ids, from 0, the models share; None is the teacher's all.
        merged_ids: ids that count as one class.
        share: of several processes, which divide the answers and have all numbers each.
        progress: called after each batch with the number of answers in it.

    Returns:
        Infinite for an answer with a token that the teacher does not have, or excludes.
    """
    answers = [(row, answer) for row, pool in zip(prompts, pools, strict=True) for answer in pool]
    known = min(vocab_size or math.inf, lm_head(teacher).vocab_size)
    nll = [math.inf] * len(answers)
    places = [place for place, (_, answer) in enumerate(answers) if max(answer.token_ids) < known]
    if not places:
        return nll
    rows = [_row(place, *answers[place], begin) for place in places]
    states = read(
        teacher, rows, pad_id=pad_id, vocab_size=vocab_size, merged_ids=merged_ids, share=share, progress=progress
    )
    for place, total in zip(places, _of_rows(states, len(rows), share), strict=True):
        nll[place] = total
    return nll


def _row(place: int, prompt: Row, answer: Answer, begin: Sequence[int]) -> Row:
    """An answer as a row, of which every token but the given ones is read."""
    given = [False] * len(begin) + [True] * len(answer.token_ids)
    return Row(
        f"{prompt.id}/{place}", prompt.sampling_ids, (*begin, *answer.token_ids), prompt.example,
        tuple(given) if begin else None, encoder_decoder=prompt.encoder_decoder,
    )  # fmt: skip


@torch.no_grad()
def _of_rows(states: Readout, num_rows: int, share: Share) -> list[float]:
    """The sum of -log p over the positions of each row, in the order of the positions whoever computes them."""

    def own() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        nll = [np.empty(0)]
        for part in chunks(len(states.labels), CHUNK):
            logp = log_softmax(states.logits(part), 1.0)
            nll.append(-at(logp, states.targets(part).to(logp.device)).double().cpu().numpy())
        places = torch.arange(len(states.labels)) if states.positions is None else states.positions
        return [(places.numpy(), states.row_index.numpy(), np.concatenate(nll))]

    places, rows, nll = (np.concatenate(part) for part in zip(*share.together(own), strict=True))
    order = places.argsort()
    return [float(total) for total in np.bincount(rows[order], nll[order], num_rows)]
