"""Tiny random language models for tests: `tiny_lm(kind, chat)`, seeded, float32, made in a fraction of a second.

Refuses to know files and networks: the tokenizer is trained here on a few sentences.
Source: configurations of the architectures that selfparam promises to serve (README).
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from selfparam.lm import LM

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2",
         "smollm3", "gemma4_text")
#: Those that are read one row to a line: recurrent layers beside attention, or positions that tell no rows apart.
APART = ("qwen3_5_text", "lfm2", "falcon_h1", "granitemoehybrid", "opt")
#: Mixtures of experts; the last one is read apart, too.
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
WINDOW = 1024
_SENTENCES = (
    "Context: The harbour of Tamberwick was built in 1904 by Philla Grunstone.",
    "Question: Who built the harbour of Tamberwick?\nAnswer: Philla Grunstone\n",
    "The lighthouse keeper writes the weather into a blue book every morning.",
)
_SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
#: What a kind needs besides the common numbers.
_OWN = {
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "qwen3": {"head_dim": 8},
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "sliding_window": 16, "vocab_size_per_layer_input": 300,
                    "hidden_size_per_layer_input": 8},
    "qwen3_5_text": {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64,
                         "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 300 entries: every text can be encoded and comes back as it was."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(_SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(_SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = _TEMPLATE
    return tokenizer


def tiny_lm(kind: str = "llama", chat: bool = False, seed: int = 0) -> LM:
    """A random model of `kind` (of the lists above): hidden 32, 2 layers, 4 heads, window 1024, float32, on a CPU."""
    tokenizer = tiny_tokenizer(chat)
    common = {
        "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,  # logits of about 1, so that contexts matter
    }
    if kind == "gpt2":
        config = CONFIG_MAPPING[kind](n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW, **common)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if kind in ("phi", "phi3", "gpt_neox") else 2}
        config = CONFIG_MAPPING[kind](hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads,
                                      max_position_embeddings=WINDOW, **common, **_OWN.get(kind, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LM(model.eval(), tokenizer, f"tiny-{kind}").checked()
