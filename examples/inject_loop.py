"""The whole method in one file: afterwards the model answers without the context what it answered with it.

Two copies of one model. The teacher reads the context x in front of a sentence s, the student reads s alone, and the
student is trained until its next-token distributions on s are the teacher's (Eq. 2): KL[P_θ(s|x) ‖ P_θ'(s)] -> min.
The sentences are question-answer pairs about x and, to hold the model where it was, text that has nothing to do with x.

Plain and chat models whose layers carry Llama's names (Llama, Mistral, Qwen, Gemma). Refuses to know how to be quick:
one sentence at a time, the teacher again every epoch, all logits in memory; selfparam.inject gives the same numbers.
Source: SELF-PARAM, arXiv 2410.00487, section 3 and A.2.

    python inject_loop.py --model DIR --context x.txt --pairs pairs.jsonl --unrelated other.txt --out DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"]}
MARK = "\u2402\u2403"  # stands for the words in a chat template, to find what is around them
Row = tuple[list[int], list[int], list[int]]
Pairs = Sequence[tuple[str, str]]  # (question, answer)


def prefix_and_sentences(tokenizer: Any, context: str, pairs: Pairs, unrelated: Sequence[str]) -> list[Row]:
    """(ids in front of s for the teacher, ids in front of s for the student, ids of s) for every sentence.

    s is the same ids on both sides: rows are joined as ids, texts are never joined and tokenised again.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    bos = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if tokenizer.chat_template:
        user, assistant = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
        asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template([user, assistant], tokenize=False)
        before, between = (encode(part) for part in asked.split(MARK))
        head, end = before or bos, encode(told.rsplit(MARK, 1)[-1]) or [tokenizer.eos_token_id]
        related = [encode(q) + between + encode(a) + end for q, a in pairs]
    else:
        head, related = bos, [encode(f"Question: {q}\nAnswer:") + encode(f" {a}\n") for q, a in pairs]
    rows = [(head + encode(f"Context: {context}\n\n"), head, s) for s in related]
    return rows + [(bos + encode(f"{context}\n\n"), bos, encode(text)) for text in unrelated]


def log_probabilities(model: Any, prefix: list[int], s: list[int]) -> torch.Tensor:
    """log P(s | prefix) over the whole vocabulary, float32 [len(s), V]: the place in front of a token predicts it."""
    ids = torch.tensor([prefix + s], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1]
    return F.log_softmax(logits.float(), dim=-1)


def inject(model: Any, tokenizer: Any, context: str, pairs: Pairs, unrelated: Sequence[str], epochs: int = 50,
           lr: float = 2e-5, *, train: str = "lora", dropout: float = 0.1, batch: int = 32,
           seed: int = 0) -> tuple[Any, list[float]]:
    """(θ', loss of every epoch in nats per token). `model` is the teacher and stays as it is.

    train: "lora" or "full". batch: sentences in one optimiser step.
    Raises ValueError when there is no sentence, or the context and a sentence do not fit the model's window.
    """
    rows = prefix_and_sentences(tokenizer, context, pairs, unrelated)
    window = model.config.get_text_config().max_position_embeddings
    if not rows or max(len(prefix) + len(s) for prefix, _, s in rows) > window:
        raise ValueError(f"no sentences, or more than the window of {window} tokens: give pairs, or split the context")
    teacher, student = model.eval(), copy.deepcopy(model).requires_grad_(True)
    torch.manual_seed(seed)
    order = random.Random(seed)
    if train == "lora":
        student = get_peft_model(student, LoraConfig(**LORA, lora_dropout=dropout, task_type="CAUSAL_LM"))
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses: list[float] = []
    student.train()
    for epoch in range(epochs):
        order.shuffle(rows)
        total = 0.0
        for step in (rows[i : i + batch] for i in range(0, len(rows), batch)):
            tokens = sum(len(s) for *_, s in step)
            for teacher_prefix, student_prefix, s in step:
                with torch.no_grad():
                    log_p = log_probabilities(teacher, teacher_prefix, s)
                log_q = log_probabilities(student, student_prefix, s)
                kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
                torch.autograd.backward(kl / tokens)  # adds up to the gradient of the mean over the step's tokens
                total += kl.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / sum(len(s) for *_, s in rows))
        print(f"epoch {epoch + 1}/{epochs}: {losses[-1]:.4f} nats per token")
    return (student.merge_and_unload() if train == "lora" else student).eval(), losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a context into the weights of a model.")
    parser.add_argument("--model", required=True, help="Hugging Face model directory or hub name")
    parser.add_argument("--context", type=Path, required=True, help="text file: x")
    parser.add_argument("--pairs", type=Path, required=True, help='JSONL: {"question": …, "answer": …} about x')
    parser.add_argument("--unrelated", type=Path, help="text file, one unrelated sentence a line")
    parser.add_argument("--out", required=True, help="directory for the new weights")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args(argv)
    records = [json.loads(line) for line in args.pairs.read_text("utf-8").splitlines() if line.strip()]
    pairs = [(r["question"], r["answer"]) for r in records]
    lines = args.unrelated.read_text("utf-8").splitlines() if args.unrelated else []
    unrelated = [line for line in lines if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    merged, _ = inject(model, tokenizer, args.context.read_text("utf-8"), pairs, unrelated, args.epochs, args.lr)
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
