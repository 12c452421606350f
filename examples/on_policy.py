"""A student learns on what it writes itself, from prompts alone: `python examples/on_policy.py`, in seconds."""

from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import drkl

letters = Tokenizer(models.BPE({chr(code): code for code in range(128)}, []))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=chr(0), eos_token=chr(1))
teacher, student = (
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_head=2, n_layer=n, bos_token_id=1, eos_token_id=1))
    for n in (4, 2)
)
prompts = [{"prompt": f"{i}, {i + 1}, "} for i in range(96)]
args = drkl.DistillationConfig(
    "runs/on-policy", rollout_share=1.0, rollout_max_new_tokens=8, max_steps=12, eval_steps=6, logging_steps=3
)
trainer = drkl.DistillationTrainer(student, teacher, args, prompts[:80], prompts[80:], processing_class=tokenizer)
trainer.train()
trainer.save_model()
for line in trainer.run.read_train_log():
    print({name: round(line[name], 3) for name in ("step", "eval_rollout_rkl", "rollout_length") if name in line})
