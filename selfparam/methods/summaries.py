"""Who writes RAPTOR's summaries: the model itself, another local one, or an OpenAI-compatible endpoint.

Refuses to know trees. Source: arXiv 2401.18059 (the request); arXiv 2410.00487, section 4.2 (gpt-4o-mini writes them).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache

from selfparam.errors import AuthorError
from selfparam.lm import LM

#: child texts of each node -> a summary of each
Summarise = Callable[[Sequence[Sequence[str]]], list[str]]
REQUEST = "Write a summary of the following, including as many key details as possible: "
SUMMARY_TOKENS = 100


def joined(texts: Sequence[str]) -> str:
    """Texts of a node as RAPTOR puts them together: no line breaks inside, a blank line behind each."""
    return "".join(" ".join(text.splitlines()) + "\n\n" for text in texts)


def by_model(lm: LM) -> Summarise:
    """Summaries by a local model, greedy; texts that do not fit its window are left out from the end."""

    def row(texts: Sequence[str]) -> list[int]:
        kept = len(texts)
        while True:
            ids = [*lm.prefix(), *lm.question(REQUEST + joined(texts[:kept]))]
            if kept <= 1 or len(ids) + SUMMARY_TOKENS < lm.window:
                return ids
            kept -= 1

    def summarise(groups: Sequence[Sequence[str]]) -> list[str]:
        stop = None if lm.is_chat else "\n"
        texts = lm.generate([row(group) for group in groups], max_new_tokens=SUMMARY_TOKENS, stop=stop)
        return [text.strip() or group[0] for text, group in zip(texts, groups, strict=True)]

    return summarise


def by_endpoint(model: str, url: str | None) -> Summarise:
    """Summaries by an endpoint; the key is read from OPENAI_API_KEY. Raises AuthorError."""
    try:
        import openai
    except ImportError as error:
        raise AuthorError("endpoints need the package 'openai': pip install 'selfparam[endpoint]'") from error
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise AuthorError(f"no key for '{model}': set the environment variable OPENAI_API_KEY")
    client = openai.OpenAI(api_key=key, base_url=url, max_retries=5)

    def one(texts: Sequence[str]) -> str:
        try:
            reply = client.chat.completions.create(
                model=model, max_tokens=SUMMARY_TOKENS, messages=[{"role": "user", "content": REQUEST + joined(texts)}])
        except openai.APIError as error:
            raise AuthorError(f"'{model}' wrote no summary ({' '.join(str(error).split())[:120]}): try again later, or "
                              "choose another one") from error
        return str(reply.choices[0].message.content or "").strip() or texts[0]

    return lambda groups: [one(group) for group in groups]


@lru_cache(maxsize=1)
def local(name: str) -> LM:
    """Another model for summaries, loaded once in a process. Raises ModelError."""
    return LM.load(name)
