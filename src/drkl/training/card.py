"""The model card that lies in ``student/``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from drkl._version import __version__
from drkl.data.rendering import Writer
from drkl.data.template import encode_prompt
from drkl.display import markdown_name, markdown_text
from drkl.errors import DrklError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BODY = """# {name}

A {what} distilled with drkl {version}.

| | |
|---|---|
| Teacher | {teacher} |
| Start | {start} |
| Objective | {objective} |
| Steps | {steps}, each of {size} |
| Data | {data} |
| Held-out loss of these weights | {loss} |

{note}{intro}:

```python
{usage}
```

The licences of the teacher and of the data apply to it. It inherits their faults and adds some of its own: a small
model that imitates a larger one {fault}. The configuration is in `config.yaml` of the run.
"""


_USAGE = """from transformers import pipeline

pipe = pipeline("text-generation", model="PATH/TO/THIS/FOLDER")
print({ask})"""
_USAGE_ADAPTER = """from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

folder = "PATH/TO/THIS/FOLDER"
model = AutoModelForCausalLM.from_pretrained(folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
print({ask})"""
_ASK_CHAT = 'pipe({prompt}, max_new_tokens=64)[0]["generated_text"][-1]'
_ASK_TEXT = 'pipe({prompt}, max_new_tokens=64, return_full_text=False{more})[0]["generated_text"]'
_USAGE_ENCODER_DECODER = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

folder = "PATH/TO/THIS/FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSeq2SeqLM.from_pretrained(folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
inputs = tokenizer("Give me three tips.", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""

_USAGE_CLASSIFIER = """from transformers import pipeline

pipe = pipeline("text-classification", model="PATH/TO/THIS/FOLDER")
print(pipe("Where is my card?"))"""
_KINDS = {
    "decoder": ("text-generation", _USAGE),
    "adapter": ("text-generation", _USAGE_ADAPTER),
    "encoder_decoder": ("text2text-generation", _USAGE_ENCODER_DECODER),
    "classifier": ("text-classification", _USAGE_CLASSIFIER),
}
_QUESTION = "Give me three tips."


def usage_of(kind: str, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return Python lines that ask a model as it was taught to be asked.

    Args:
        kind: ``decoder``, ``adapter``, ``encoder_decoder`` or ``classifier``.
        tokenizer: the model's.
        template: what wrote the prompts, as `DataConfig.template`.
    """
    lines = _KINDS[kind][1]
    if kind not in ("decoder", "adapter"):
        return lines
    messages = [{"role": "user", "content": _QUESTION}]
    if Writer(tokenizer, template).kind == "chat":
        return lines.format(ask=_ASK_CHAT.format(prompt=json.dumps(messages)))
    try:
        prompt, ids = Writer(tokenizer, template).prompt(messages), encode_prompt(tokenizer, messages, template)
    except DrklError:  # a template of the user's own that takes no lone question
        prompt, ids = _QUESTION, []
    taught_bare = ids and tokenizer(prompt)["input_ids"] != ids
    more = ", add_special_tokens=False" if taught_bare else ""
    return lines.format(ask=_ASK_TEXT.format(prompt=json.dumps(prompt, ensure_ascii=False), more=more))


def model_card(
    name: str,
    resolved: dict[str, Any],
    heldout_loss: float | None,
    note: str | None,
    *,
    usage: str,
    kind: str = "decoder",
    steps: int,
    step: int,
) -> str:
    """Return the card's markdown, metadata first.

    Args:
        name: the run's.
        resolved: the sections of its config.
        heldout_loss: that of the weights, in nats; None where it was not measured.
        note: what else is to be said.
        usage: that of `usage_of`.
        kind: as `usage_of` takes it.
        steps: optimiser steps that were taken.
        step: the one after which the weights were; the last, or that of the best weights.
    """
    teacher, student, training = resolved["teacher"], resolved["student"], resolved["training"]
    objective = dict(resolved["objective"])
    data = resolved["data"]
    places = data.get("sources") or [data]
    params = ", ".join(f"{k}={v}" for k, v in objective.items() if k != "name")
    task = _KINDS[kind][0]
    classifies = kind == "classifier"
    unit = "text" if classifies else "token"
    tokens = training["tokens_per_step"]
    meta = {"library_name": "transformers", "pipeline_tag": task, "tags": ["drkl", "distillation"]}
    if teacher is None:
        meta["tags"] = ["drkl"]
    made_of = student["config"].get("model_type")
    start = f"{student['init']} of {markdown_name(student['model'] or made_of or (teacher or {}).get('model', '?'))}"
    body = _BODY.format(
        name=markdown_text(name),
        version=__version__,
        teacher="none (fine-tuning)" if teacher is None else markdown_name(teacher["model"]),
        start=start + (f", layers {student['layers']}" if student["layers"] else ""),
        objective=markdown_name(objective["name"] + (f"({params})" if params else "")),
        steps=steps if step == steps else f"{step}, the best of {steps}",
        size=f"at most {tokens} tokens" if tokens else f"{training['per_device_train_batch_size']} rows on each device",
        data=", ".join(markdown_name(place["path"] or place["dataset"]) for place in places),
        loss="not measured" if heldout_loss is None else f"{heldout_loss:.4f} nats per {unit}",
        intro="To use it" if kind == "adapter" else "It is an ordinary Hugging Face model",
        usage=usage,
        what="text classifier" if classifies else "language model",
        fault="is sure of wrong classes too" if classifies else "states falsehoods fluently",
        note=f"{note}\n\n" if note else "",
    )
    return f"---\n{yaml.safe_dump(meta, sort_keys=False)}---\n{body}"
