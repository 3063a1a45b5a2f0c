"""Train the embedded model from scratch: one script for CPU and GPU, resumable, checkpoints in small pieces.

    python pretraining/train.py --data ../shared/data --run pretraining/run --tokens 34e6

Run it again to resume: batches depend on the seed and the step alone, so nothing but weights, optimiser state and the
step is kept. Without --data only the fictional worlds are used. Muon on matrices, AdamW on the rest; warm-up,
constant, linear decay. Refuses to know injection.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from corpus import ASSISTANT, BOS, END, PAD, SPECIAL, USER, Corpus, WildSlots, load_qa, tokenizer_texts

from selfparam.data import worlds
from selfparam.inject.trainable import make_muon

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.03,
}
LR_MUON, LR_ADAMW, WARMUP = 0.02, 2e-3, 150
BATCH_TOKENS = 6144
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% else %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(data: Path | None, folder: Path) -> Tokenizer:
    """Byte-level BPE with single digits; written as an ordinary Hugging Face tokenizer with its chat template."""
    path = folder / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"], special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(tokenizer_texts(data), trainer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=END,
            pad_token=PAD,
            additional_special_tokens=[USER, ASSISTANT],
            model_max_length=SHAPE["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
            chat_template=TEMPLATE,
        )
        fast.save_pretrained(folder)
    return Tokenizer.from_file(str(path))


def new_model(tokenizer: Tokenizer, init: Path | None) -> LlamaForCausalLM:
    if init:
        return LlamaForCausalLM.from_pretrained(init, dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def length_at(progress: float) -> int:
    """Row length in tokens: short rows first, the whole window at the end."""
    return 256 if progress < 0.12 else 512 if progress < 0.9 else SHAPE["max_position_embeddings"]


def progress_at(seen: int, tokens: float, start: float) -> float:
    """Place in the schedule of learning rate, lengths and mixture: from `start` to 1."""
    return start + (1 - start) * seen / tokens


def lr_factor(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.0, (1 - progress) / 0.45))


class Batches(IterableDataset):  # type: ignore[type-arg]
    """(step, ids, weights) from `step` on until `tokens` tokens are used."""

    def __init__(self, corpus: Corpus, step: int, seen: int, tokens: int, start: float) -> None:
        self.corpus, self.step, self.seen, self.tokens, self.start = corpus, step, seen, tokens, start

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        step, seen = self.step, self.seen
        while seen < self.tokens:
            progress = progress_at(seen, self.tokens, self.start)
            length = length_at(progress)
            ids, weights = self.corpus.batch(step, BATCH_TOKENS // length, length, progress)
            seen += ids.size
            yield step, seen, torch.from_numpy(ids), torch.from_numpy(weights)
            step += 1


def save(run: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], state: dict[str, float]) -> None:
    """Weights and optimiser state as safetensors in pieces of at most 16 MB; the state file last."""
    model.save_pretrained(run, max_shard_size="16MB")
    tensors = {
        f"{i}/{k}/{name}": v.contiguous()
        for i, o in enumerate(optimizers)
        for k, s in o.state_dict()["state"].items()
        for name, v in s.items()
        if torch.is_tensor(v)
    }
    piece: dict[str, torch.Tensor] = {}
    pieces = 0
    for key, value in [*tensors.items(), ("", torch.empty(0))]:
        if piece and (not key or sum(t.nbytes for t in piece.values()) + value.nbytes > 16e6):
            save_file(piece, run / f"optimizer-{pieces:02d}.safetensors")
            piece, pieces = {}, pieces + 1
        if key:
            piece[key] = value
    (run / "state.tmp").write_text(json.dumps(state))
    (run / "state.tmp").rename(run / "state.json")


def restore(run: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    tensors = {k: v for path in sorted(run.glob("optimizer-*.safetensors")) for k, v in load_file(path).items()}
    for i, optimizer in enumerate(optimizers):
        loaded = optimizer.state_dict()
        for key, value in tensors.items():
            which, parameter, name = key.split("/")
            if int(which) == i:
                loaded["state"].setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict(loaded)


def probes(corpus: Corpus, data: Path | None) -> dict[str, list[tuple[str | None, str, str]]]:
    """Held-out (context, question, answer) triples by name, for a teacher-forced look during training."""
    items = worlds.held_out(12)
    hard = worlds.held_out(12, wordings="held-out")
    found: dict[str, list[tuple[str | None, str, str]]] = {
        "worlds": [(i.context.text, q.text, q.answers[0]) for i in items for q in i.questions],
        "hard": [(i.context.text, q.text, q.answers[0]) for i in hard for q in i.questions],
        "blind": [(None, q.text, q.answers[0]) for i in items for q in i.questions],
        "known": [(None, q.text, q.answers[0]) for q in worlds.known_questions(60)],
        "scenes": [(c.text, q.text, q.answers[0]) for c, qs in worlds.held_out_passages(12) for q in qs],
    }
    rng = random.Random("wild")
    for _ in range(12):
        item = worlds.subject(WildSlots(rng, corpus.pieces, corpus.whole), rng.choice(worlds.domains()), 5)
        asked = [(f.ask(f.relation.questions("known")[0], item.name), f.answer) for f in item.facts]
        text = worlds.render(item, rng)
        found.setdefault("wild", []).extend((text, q, a) for q, a in asked)
    for name, groups in (load_qa(data, ["xquad_en", "fairytaleqa_val"], evaluation=True) if data else {}).items():
        triples = [(c, q, a) for c, qa in groups for q, a in qa]
        found[name[:5]] = random.Random(0).sample(triples, 60)
    return found


@torch.no_grad()
def look(
    model: LlamaForCausalLM, corpus: Corpus, found: dict[str, list[tuple[str | None, str, str]]]
) -> dict[str, float]:
    """Share of answers whose every token is the model's first choice (teacher-forced)."""
    scores = {}
    for name, triples in found.items():
        rows = []
        for context, question, answer in triples:
            head = f"Context: {context}\n\n" if context else ""
            pieces = [
                [corpus.ids[BOS], corpus.ids[USER]],
                *([corpus.tokenizer.encode(head).ids] if head else []),
                corpus.tokenizer.encode(question).ids,
                [corpus.ids[ASSISTANT]],
            ]
            rows.append(
                (list(itertools.chain.from_iterable(pieces)), [*corpus.tokenizer.encode(answer).ids, corpus.ids[END]])
            )
        rows.sort(key=lambda r: len(r[0]))
        hits = 0
        for at in range(0, len(rows), 12):
            part = rows[at : at + 12]
            width = max(len(p) + len(a) for p, a in part)
            ids = torch.full((len(part), width), corpus.ids[PAD])
            for i, (p, a) in enumerate(part):
                ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            best = model(ids.to(model.device)).logits.argmax(-1).cpu()
            hits += sum(best[i, len(p) - 1 : len(p) + len(a) - 1].tolist() == a for i, (p, a) in enumerate(part))
        scores[name] = round(hits / len(rows), 3)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with qa/ and text/ (optional)")
    parser.add_argument("--run", type=Path, default=Path("pretraining/run"))
    parser.add_argument("--init", type=Path, help="start a new run from the weights and tokenizer of this model")
    parser.add_argument("--tokens", type=float, default=34e6)
    parser.add_argument("--start", type=float, default=0.0, help="with --init: where in the schedule to start, 0 to 1")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (resumably) after this many minutes")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.init and not (options.run / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(options.init).save_pretrained(options.run)
    tokenizer = make_tokenizer(options.data, options.run)
    state_file = options.run / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "seen": 0, "seconds": 0.0}
    if state["step"]:
        model = LlamaForCausalLM.from_pretrained(options.run, dtype=torch.float32)
    else:
        model = new_model(tokenizer, options.init)
    model.to(device).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        make_muon(matrices, lr=LR_MUON, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=LR_ADAMW, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    if state["step"]:
        restore(options.run, optimizers)
    corpus = Corpus(tokenizer, options.data)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters on {device}; step {state['step']}, {state['seen'] / 1e6:.1f} M tokens",
        flush=True,
    )

    def loss_of(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        return (losses * w).sum() / w.sum()

    compiled = loss_of if options.no_compile else torch.compile(loss_of, dynamic=False)
    found = probes(corpus, options.data)
    started = last = time.time()
    window: list[float] = []
    batches = DataLoader(
        Batches(corpus, state["step"], state["seen"], int(options.tokens), options.start),
        batch_size=None,
        num_workers=1,
        prefetch_factor=8,
    )
    for step, seen, ids, weights in batches:
        factor = lr_factor(step, progress_at(seen, options.tokens, options.start))
        for optimizer, lr in zip(optimizers, (LR_MUON, LR_ADAMW), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        loss = compiled(ids.to(device), weights.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        if not math.isfinite(window[-1]):
            sys.exit(f"loss is not finite at step {step}: lower the learning rate and run again to resume")
        now = time.time()
        done = now - started > options.minutes * 60 or seen >= options.tokens
        if (step + 1) % 50 == 0:
            rate = 50 * ids.numel() / (now - last)
            left = (options.tokens - seen) / rate / 60
            print(
                f"step {step + 1} tokens {seen / 1e6:.2f}M loss {sum(window) / len(window):.3f} {rate:.0f} tok/s "
                f"({6 * parameters * rate / 1e12:.2f} TFLOP/s) {left:.0f} min left",
                flush=True,
            )
            window, last = [], now
        if (step + 1) % 250 == 0 or done:
            model.eval()
            scores = look(model, corpus, found)
            model.train()
            seconds = state["seconds"] + time.time() - started
            with contextlib.suppress(OSError), (options.run / "curve.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "tokens": seen, "seconds": round(seconds), **scores}) + "\n")
            print(f"  {scores}", flush=True)
            save(options.run, model, optimizers, {"step": step + 1, "seen": seen, "seconds": seconds})
            last = time.time()
        if done:
            break


if __name__ == "__main__":
    main()
