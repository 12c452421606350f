"""Chat templates in a whole run: rows without the tag that prompts open, samples with it, one date for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import drkl
from drkl.data.template import encode_prompt
from tests.data.tiny_tokenizers import CHATML, build
from tests.models.chains import chain

THINKING = "{{ strftime_now('%Y') }}" + CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def made() -> Any:
    tokenizer = build(THINKING, extra=["2024", "think", "<", ">"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def test_a_run_says_what_its_template_does_and_samples_after_the_whole_prompt(tmp_path: Path) -> None:
    tokenizer = made()
    rows = [{"prompt": "hi" if i % 2 else "a b", "response": "hello"} for i in range(8)]
    args = drkl.DistillationConfig(
        output_dir=str(tmp_path), use_cpu=True, precision="fp32", disable_tqdm=True, tokens_per_step=200, max_tokens=64,
        eval_strategy="no", objective="fkl", max_steps=1, save_steps=1,
    )  # fmt: skip
    models = [chain(tokenizer, {"\n": "hello", "hello": end}) for end in ("a", "<|im_end|>")]
    trainer = drkl.DistillationTrainer(*models, args, train_dataset=rows, processing_class=tokenizer)
    said = " ".join(trainer.pair.notes)
    assert "which 8 row(s) do not have" in said and "it is told 26 July 2024" in said
    for row in trainer.pair.rows:
        assert tokenizer.convert_ids_to_tokens(row.prompt_ids)[-3:] == ["<|im_start|>", "assistant", "\n"]
        assert list(row.sampling_ids) == encode_prompt(tokenizer, row.example.prompt_messages)
        assert tokenizer.convert_ids_to_tokens(row.sampling_ids)[-2:] == ["<think>", "\n"]
        assert tokenizer.convert_ids_to_tokens(row.all_ids)[0] == "2024"
