"""Make a Qwen3 of random weights, with its own tokenizer: `tiny_model.py DIRECTORY`.

Runs in vLLM's environment. The seed is fixed, so every machine gets the same model and the same
answers, which mean nothing.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SENTENCES = [
    "Prefill reads the prompt and decode writes the answer.",
    "The keys and values of every token move from one host to the other.",
    "How are you today? I am a small model with random weights.",
    "A router sends each request to a prefill first and to a decode second.",
]
END = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def main(directory: str) -> None:
    """Write the model and the tokenizer to a directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=512, special_tokens=[END], initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.lm_head.weight.data[[not _readable(fast, token) for token in range(512)]] = 0
    model.to(torch.bfloat16).save_pretrained(directory)


def _readable(tokenizer: PreTrainedTokenizerFast, token: int) -> bool:
    """Tell whether a token is made of letters; only such tokens are ever generated."""
    text = tokenizer.decode([token])
    return len(text) > 1 and text.isascii() and text.strip().isalpha()


if __name__ == "__main__":
    main(sys.argv[1])
