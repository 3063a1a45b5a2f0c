"""Conversations as targets, and recommendations: what FT (C) and SELF-PARAM train on, and the 20 titles asked.

Pairs about a conversation are written as about any context (targets.write_pairs); here are the kinds of sentence that
only conversations have. Refuses to know training and scores: texts go to metrics.recall.
Source: SELF-PARAM, arXiv 2410.00487, 4.4; the prompt (prompts/recommend.txt) is that of He et al., arXiv 2308.10053.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from selfparam.data.conversations import input_of, turns_of
from selfparam.errors import TargetError
from selfparam.lm import LM, Progress
from selfparam.types import Context, Sentence, TargetSet


def prompt_named(name: str) -> str:
    """A prompt with {input}, a file of prompts/. Raises TargetError."""
    file = resources.files("selfparam.prompts").joinpath(f"{name}.txt")
    text = file.read_text("utf-8") if name.isidentifier() and file.is_file() else ""
    if "{input}" not in text:
        raise TargetError(f"no prompt '{name}' for recommendations: use recommend or bare")
    return text


RECOMMEND = prompt_named("recommend")
#: For models too small to follow an instruction: the conversation alone.
BARE = prompt_named("bare")
NEW_TOKENS = 512


def request(conversation: str, prompt: str = RECOMMEND) -> str:
    """The prompt with the conversation (Request.input) in its place. Raises ValueError for a prompt without {input}."""
    if "{input}" not in prompt:
        raise ValueError("the prompt does not say where the conversation goes: write {input} into it")
    return prompt.replace("{input}", conversation)


def recommend(lm: LM, conversations: Sequence[str], contexts: Sequence[str | None] | None = None, *,
              prompt: str = RECOMMEND, max_new_tokens: int = NEW_TOKENS, progress: Progress | None = None) -> list[str]:
    """Greedy recommendations for each conversation (Request.input), one text each, without the prompt.

    contexts: what stands in front of each (conversations found by a retriever, or the one the teacher sees).
    A base model stops where it would ask itself the next question. Raises ModelError for a prompt beyond the window.
    """
    each = contexts or [None] * len(conversations)
    rows = [[*lm.prefix(x), *lm.question(request(said, prompt))] for said, x in zip(conversations, each, strict=True)]
    stop = None if lm.is_chat else "\nQuestion:"
    return lm.generate(rows, max_new_tokens=max_new_tokens, stop=stop, progress=progress)


def shortened(lm: LM, conversation: str, tokens: int, prompt: str = RECOMMEND) -> str:
    """The conversation (Request.input) without its oldest turns, so that the prompt takes at most `tokens`.

    Unchanged where it fits; the last turn is never dropped.
    """
    if len(lm.question(request(conversation, prompt))) <= tokens:
        return conversation
    lines = conversation.removeprefix("\n").split("\n")
    while len(lines) > 2 and len(lm.question(request("\n" + "\n".join(lines), prompt))) > tokens:
        lines = lines[1:]
    return "\n" + "\n".join(lines)


def system_turns(x: Context) -> tuple[Sentence, ...]:
    """A sentence for each system turn: what was said before it, and the turn. Raises DataError (no conversation)."""
    turns = turns_of(x)
    return tuple(Sentence(input_of(turns[:i]).lstrip("\n"), turn.text, x.id)
                 for i, turn in enumerate(turns) if turn.role == "System")


def recommendations(lm: LM, conversations: Sequence[Context], *, turns: int = 1, prompt: str = RECOMMEND,
                    max_new_tokens: int = NEW_TOKENS, progress: Progress | None = None) -> list[tuple[Sentence, ...]]:
    """The recommendation prompt as a kind of target: what the teacher, with x in front, recommends at turns of x.

    turns: at most so many of the system turns that follow a user's, evenly chosen; for each, the prompt with the
    conversation up to it and the greedy answer. Conversations without such a turn give none.
    """
    asked: list[tuple[int, str]] = []
    for i, x in enumerate(conversations):
        spoken = turns_of(x)
        places = [k for k in range(1, len(spoken)) if spoken[k].role == "System"]
        n = min(turns, len(places))
        asked += [(i, input_of(spoken[: places[(2 * j + 1) * len(places) // (2 * n)]])) for j in range(n)]
    texts = recommend(lm, [said for _, said in asked], [conversations[i].text for i, _ in asked], prompt=prompt,
                      max_new_tokens=max_new_tokens, progress=progress)
    found: list[list[Sentence]] = [[] for _ in conversations]
    for (i, said), text in zip(asked, texts, strict=True):
        if text.strip():
            found[i].append(Sentence(request(said, prompt), text.strip(), conversations[i].id))
    return [tuple(sentences) for sentences in found]


def ft_c(x: Context) -> TargetSet:
    """FT (C): the conversation itself, for next-word loss on the system's turns."""
    return TargetSet(x, system_turns(x), (), "system turns")
