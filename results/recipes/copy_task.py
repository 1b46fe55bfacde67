"""The made-up task of the two language recipes: write the prompt once more, then stop.

A prompt is one letter, repeated 1 to 4 times and padded from the left. The text is what comes
before the first EOS in 8 tokens that the sampler fills. Its reward is the share of letters copied.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[2]))  # where dipod.py is
from dipod import draw_masks, masked_elbo

VOCABULARY = ["[PAD]", "[MASK]", "[EOS]", "a", "b", "c", "d"]
PAD, MASK, EOS = 0, 1, 2
PROMPT, REGION = 4, 8


def start_tokens(num_prompts, group):
    """(B, T) tokens as the sampler gets them, B = num_prompts * group: a prompt, then MASK."""
    letter = torch.randint(EOS + 1, len(VOCABULARY), (num_prompts, 1))
    length = torch.randint(1, PROMPT + 1, (num_prompts, 1))
    prompt = torch.where(torch.arange(PROMPT) < PROMPT - length, PAD, letter)
    start = torch.nn.functional.pad(prompt, (0, REGION), value=MASK)
    return start.repeat_interleave(group, 0)


def reward(prompt, text):
    """Share of letters copied, of lists of tokens. Only here it matters where the text ends."""
    prompt = [token for token in prompt if token != PAD]
    text = text[: text.index(EOS)] if EOS in text else text
    return sum(a == b for a, b in zip(prompt, text)) / max(len(prompt), len(text))


def base_model(as_model, updates):
    """A tiny BERT that writes the right letter, but any number of it: pretrained on its ELBO."""
    shape = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": len(VOCABULARY)}
    bert = BertForMaskedLM(BertConfig(**shape, num_hidden_layers=2, num_attention_heads=4)).eval()
    optimizer = torch.optim.AdamW(bert.parameters(), 1e-3)
    for _ in range(updates):
        start = start_tokens(num_prompts=64, group=1)
        end = PROMPT + torch.randint(0, REGION + 1, (len(start), 1))
        letter = start[:, PROMPT - 1 : PROMPT]
        text = torch.where(torch.arange(PROMPT + REGION) < end, letter, EOS)
        tokens = torch.where(start == MASK, text, start)
        draws = draw_masks(start == MASK, num_draws=2)
        loss = -masked_elbo(as_model(bert, start != PAD), tokens, draws, MASK).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bert


# The task as TRL wants it: texts, a tokenizer, a reward function, and settings for a small run.
PROMPTS = [" ".join(letter * times) for letter in "abcd" for times in range(1, PROMPT + 1)]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, "[PAD]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")
SMALL = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 64}
SMALL |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
SMALL |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}


def copied(prompts, completion_ids, **unused):
    prompt_ids = TOKENIZER(prompts)["input_ids"]
    return [reward(prompt, text) for prompt, text in zip(prompt_ids, completion_ids)]
