"""What each number of ``eval.json`` is, as it stands in the file itself."""

from __future__ import annotations

_POSITIONS = "mean over held-out response tokens, end of turn included; q = the model, p = the teacher, temperature 1"
_ANSWERS = "mean over sampled answers"

DEFINITIONS: dict[str, str] = {
    "fkl": f"KL(p || q), nats; {_POSITIONS}",
    "rkl": f"KL(q || p), nats; {_POSITIONS}",
    "tvd": "1/2 sum |p - q|, 0 to 1; mean over the same tokens",
    "agreement": "share of tokens where argmax q = argmax p",
    "nll": "-log q of the observed token, nats",
    "accuracy": "share of tokens where argmax q is the observed token",
    "entropy": "-sum q log q, nats",
    "confidence": "max q",
    "overconfidence": "q(y*) - p(y*), y* = argmax q",
    "confidence_gap": "mean max q - mean max p",
    "entropy_gap": "mean entropy of q - mean entropy of p, nats",
    "target_gap": "q(t) - p(t), t = argmax p",
    "rouge_l": f"ROUGE-L F-measure against the reference (rouge-score, stemmed), 0 to 100; {_ANSWERS}",
    "distinct_1": "different 1-grams / all 1-grams of the answers to one prompt (sacrebleu 13a tokens, lower-cased), "
    "0 to 1; mean over prompts",
    "distinct_2": "the same with 2-grams",
    "self_bleu": "BLEU-4 of each answer against the other answers to its prompt (sacrebleu sentence BLEU, 13a tokens, "
    "case kept, exp smoothing, effective order), 0 to 100; mean over prompts; null with one answer per prompt",
    "num_tokens": "held-out response tokens that the means are over",
}
