"""Two small models in memory, distilled, evaluated, compared, reported: `python examples/quickest.py`, in seconds."""

from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import drkl

letters = Tokenizer(models.BPE({chr(code): code for code in range(128)}, []))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=chr(0), eos_token=chr(1))
teacher, student = (GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_head=2, n_layer=n)) for n in (4, 2))
rows = [{"prompt": f"{i}, {i + 1}, ", "response": f"{i + 2}, {i + 3}"} for i in range(96)]
args = drkl.DistillationConfig("runs/quickest", num_train_epochs=2, per_device_train_batch_size=8)
trainer = drkl.DistillationTrainer(student, teacher, args, rows[:80], rows[80:], processing_class=tokenizer)
before = drkl.evaluate(student, teacher, rows[80:], tokenizer, max_new_tokens=8, name="before")
trainer.train()
trainer.save_model()
after = drkl.evaluate(student, teacher, rows[80:], tokenizer, max_new_tokens=8, name="after")
print(*drkl.compare(before, after).summary(), sep="\n")
drkl.report([before, after], "runs/quickest.html")
