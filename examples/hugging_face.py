"""A merged language model in the tools of Hugging Face: a pipeline, a Trainer, and LoRA of PEFT if it is installed.

The model is a small Llama with random weights, and its tokenizer knows sixty words.
"""

import importlib.util
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)  # fmt: skip

import fxmerge

words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(56))]
own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
own.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()

sentences = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9", "w3 w1 w4 w1 w5 w9 w2", "w2 w7 w1 w8"]
batch = tokenizer(sentences, padding=True, return_tensors="pt", return_token_type_ids=False)
small = fxmerge.merge(model, batch, ratio=0.25, samples=64).model
print(f"{sum(p.numel() for p in model.parameters()):,} -> {sum(p.numel() for p in small.parameters()):,} parameters")

generate = pipeline("text-generation", model=small, tokenizer=tokenizer)
print("pipeline:", generate("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"])

rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 60, (32, 8))]
with tempfile.TemporaryDirectory() as folder:
    settings = TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=5, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(small, settings, train_dataset=rows)
    trainer.train()
losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
print("Trainer lowers the loss:", float(losses[-1]) < float(losses[0]))

if importlib.util.find_spec("peft"):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(small, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned(**batch, labels=batch["input_ids"]).loss.backward()
    print("LoRA trains", sum(p.requires_grad for p in tuned.parameters()), "tensors")
else:
    print("LoRA: pip install peft")
