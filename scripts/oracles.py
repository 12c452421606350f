"""What every metric is tested against, and by which test: the last two columns of the docs' tables of metrics."""

from __future__ import annotations

from typing import NamedTuple

TESTS = "tests/evaluation"


class Oracle(NamedTuple):
    """Where the expected value comes from, and the test: ``file::function`` under ``TESTS``."""

    source: str
    test: str


def _by(source: str, test: str, keys: str) -> dict[str, Oracle]:
    return dict.fromkeys(keys.split(), Oracle(source, test))


_EQUATIONS = "test_positions.py::test_metrics_are_those_of_their_equations"
_LOOP = "test_class_scores.py::test_every_number_is_that_of_a_loop"
_BY_HAND = "test_answers.py::test_repetition_lengths_and_ends_by_hand"

ORACLES: dict[str, Oracle] = {
    **_by("scipy.stats.entropy", _EQUATIONS, "rkl fkl entropy entropy_gap"),
    **_by("scipy jensenshannon", _EQUATIONS, "js"),
    **_by("numpy", _EQUATIONS, "tvd agreement accuracy confidence confidence_gap target_gap overconfidence"),
    **_by("numpy", _EQUATIONS, "stronger_tail_share ece_mass brier calibration_gap tail_mass overlap_10 num_tokens"),
    **_by("scipy log_softmax", _EQUATIONS, "nll"),
    **_by("scipy logsumexp", _EQUATIONS, "target_log_odds_gap"),
    **_by("scipy rel_entr", _EQUATIONS, "tail_rkl tail_fkl"),
    **_by("scipy.stats.spearmanr", _EQUATIONS, "rank_correlation"),
    **_by("torchmetrics", "test_positions.py::test_calibration_is_torchmetrics", "ece mce"),
    **_by(
        "rouge-score",
        "test_answers.py::test_rouge_is_rouge_scores_best_reference_of_each_answer",
        "rouge_l rouge_1 rouge_2 rouge_l_best rouge_1_best rouge_2_best",
    ),
    **_by("sacrebleu", "test_answers.py::test_bleu_and_chrf_are_sacrebleus_corpus_scores", "bleu chrf"),
    **_by(
        "nltk",
        "test_answers.py::test_distinct_is_what_nltks_ngrams_count",
        "distinct_1 distinct_2 distinct_3 distinct_1_corpus distinct_2_corpus distinct_3_corpus",
    ),
    **_by(
        "sacrebleu, nltk, BLEU's equations",
        "test_answers.py::test_self_bleu_is_bleu_against_the_other_answers",
        "self_bleu",
    ),
    **_by(
        "a forward pass of the whole row",
        "test_judging.py::test_it_is_the_log_softmax_of_a_plain_forward_pass",
        "teacher_nll_of_answers",
    ),
    **_by("by hand", _BY_HAND, "distinct_answers repetition answer_tokens ended num_answers"),
}

CLASS_ORACLES: dict[str, Oracle] = {
    **_by("a loop in numpy", _LOOP, "accuracy macro_f1 agreement confidence confidence_gap target_gap overconfidence"),
    **_by("a loop in numpy", _LOOP, "ece ece_mass mce brier calibration_gap"),
    **_by("scipy log_softmax", _LOOP, "nll entropy"),
    **_by("scipy rel_entr", _LOOP, "fkl rkl"),
    **_by("by hand", "test_class_scores.py::test_eval_json_and_predictions", "num_rows"),
}
