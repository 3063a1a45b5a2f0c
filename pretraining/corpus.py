"""The corpus of the embedded model, made on the fly: batch(step) depends on the seed and the step alone.

Documents are chats or plain text: questions about a context, pairs written about a context, questions without a
context, prose, and drills that teach copying. Sources: fictional worlds (selfparam.data.worlds) and, where the folder
exists, real question-answer sets and prose whose licences allow training (README.md beside this file).
Refuses to know the model. Evaluation names, wordings, scenes, articles and texts never enter (see `held_out_row`).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from selfparam.data import worlds
from selfparam.data.slots import Person, Slots, words
from selfparam.targets.unrelated import packaged

BOS, PAD, USER, ASSISTANT, END = "<|begin|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [BOS, PAD, USER, ASSISTANT, END]
TRAIN_SETS = [
    "babi_en_train",
    "fairytaleqa_train",
    "policyqa_dev",
    "pubmedqa_pqal_cv",
    "squad2_dev_half_answerable",
    "xquad_en",
]
NGRAM = 13  # words; a training text that shares a run of this many with an evaluation text is left out
PROSE = ["country_introductions", "plain_prose", "python_peps", "standard_ebooks"]
WILD = 0.6  # share of documents with names that can only be copied
# loss weights: text in front of a question, a question, an answer with and without context, written pairs, prose
W_CONTEXT, W_QUESTION, W_ANSWER, W_BLIND, W_PAIRS, W_PROSE = 0.3, 0.5, 3.0, 0.5, 1.2, 0.5
BRIEF = resources.files("selfparam.prompts").joinpath("brief.txt").read_text("utf-8")
AGAIN = resources.files("selfparam.prompts").joinpath("again.txt").read_text("utf-8")
INSTRUCTION = BRIEF.split("{context}\n\n", 1)[1].strip()

WHOLE = ("babi_en_train", "fairytaleqa_train")  # sets without a held-out part
FACTUAL = ("squad2_dev_half_answerable", "xquad_en", "policyqa_dev", "fairytaleqa_train")
NAME = r"(?:The )?[A-Z][a-z]+(?: (?:of |the )?[A-Z][a-z]+)*"
NOT_NAMES = re.compile(
    "(The|It|He|She|They|We|You|I|This|That|These|Those|There|Here|His|Her|Its|Their|Our|My|Your|What|Who|Which|Where|"
    "When|How|Some|Many|Most|All|No|One|And|But|So|As|If|In|At|On|For|Each|Every|Both|Others|People)"
)
VERB = r"[a-z]{3,}(?:ed|s)|came|made|took|said|saw|found|gave|told|left|began|wrote|built|won|lost|led|held|sold|met"
NUMBER = r"\d[\d,.]*|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|hundred"
MONTH = r"(?:\d{1,2} )?(?:January|February|March|April|May|June|July|August|September|October|November|December) "
GAP = re.compile(r"(?<=[a-z,] )(?:[A-Z][a-z]+(?: [A-Z][a-z]+)*|\d[\d,.]*\d|\d|[a-z]{5,}(?: [a-z]{5,})?)(?=[ ,.;!?])")

Segment = tuple[str, float]  # text (or one special token) and the weight of its tokens in the loss


def held_out_row(row: dict[str, Any]) -> bool:
    """True for the real rows kept for evaluation: one article (or context) in four, by hash."""
    key = row.get("title") or row.get("story") or row["context"]
    return zlib.crc32(key.encode()) % 4 == 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_qa(
    folder: Path, names: list[str], evaluation: bool = False, longest: int = 1500
) -> dict[str, list[tuple[str, list[tuple[str, str]]]]]:
    """Real sets as {name: [(context, [(question, answer), …])]}; babi and fairytaleqa_train have no held-out part."""
    found: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {}
    for name in names:
        path = folder / "qa" / f"{name}.jsonl.gz"
        if not path.exists():
            continue
        groups: dict[str, list[tuple[str, str]]] = {}
        for row in read_rows(path):
            if name not in WHOLE and held_out_row(row) != evaluation:
                continue
            if len(row["context"]) <= longest and len(row["answers"][0].split()) <= 15:
                groups.setdefault(row["context"], []).append((row["question"].strip(), row["answers"][0].strip()))
        found[name] = list(groups.items())
    return found


def load_prose(folder: Path) -> dict[str, list[str]]:
    """Prose as {name: [text of a chapter or article]}."""
    return {
        name: [row["text"] for row in read_rows(folder / "text" / f"{name}.jsonl.gz")]
        for name in PROSE
        if (folder / "text" / f"{name}.jsonl.gz").exists()
    }


def word_ngrams(text: str) -> Iterator[int]:
    """Hashes of the runs of NGRAM words of a text, in lower case without punctuation."""
    found = re.findall(r"\w+", text.lower())
    for at in range(len(found) - NGRAM + 1):
        yield hash(tuple(found[at : at + NGRAM]))


def evaluation_ngrams(folder: Path | None) -> frozenset[int]:
    """The runs of NGRAM words of every text that is kept for evaluation."""
    texts = [Path(__file__).with_name("freely_written.jsonl").read_text("utf-8"), *packaged(), *packaged("held-out")]
    for path in sorted((folder / "qa").glob("*.jsonl.gz")) if folder else []:
        name = path.name.removesuffix(".jsonl.gz")
        if name not in WHOLE:
            texts += {r["context"] for r in read_rows(path) if name not in TRAIN_SETS or held_out_row(r)}
    if folder and (unrelated := folder / "text" / "unrelated_passages.jsonl.gz").exists():
        texts += [row["text"] for row in read_rows(unrelated)]
    if folder and (wikitext := folder / "text" / "wikitext2_valid.txt.gz").exists():
        with gzip.open(wikitext, "rt", encoding="utf-8") as lines:
            texts += lines
    return frozenset(h for text in texts for h in word_ngrams(text))


def questions_by_rule(sentence: str) -> list[tuple[str, str]]:
    """Who, what, when, where, how many and gaps: questions that a sentence answers in its own words."""
    found: list[tuple[str, str]] = []
    sentence = " ".join(sentence.split())
    body = sentence.rstrip(".!?")
    if (m := re.fullmatch(rf"({NAME}) ((?:was|is|had|has|went|{VERB}) .{{10,120}})", body)) and not NOT_NAMES.fullmatch(
        m[1]
    ):
        who = "Who" if "The " not in m[1] and "of" not in m[1] else "What"
        found.append((f"{who} {m[2]}?", m[1]))
    if m := re.fullmatch(
        rf"(?:In|On|By|Since|During) ((?:{MONTH})?\d{{4}}|{MONTH}\d{{1,2}}(?:, \d{{4}})?),? (.{{15,120}})", body
    ):
        found.append((f"When was it that {m[2]}?", m[1].strip()))
    if m := re.fullmatch(rf"(.{{15,120}}) (in|on) ((?:{MONTH})?\d{{4}}|{MONTH}\d{{1,2}}(?:, \d{{4}})?)", body):
        found.append((f"{m[1]} {m[2]} which year or on which day?", m[3].strip()))
        found.append((f"When: {m[1][0].lower()}{m[1][1:]}?", m[3].strip()))
    if m := re.fullmatch(rf"(.{{15,120}}) (?:in|at|from|to) ({NAME})", body):
        found.append((f"Where: {m[1]}?", m[2]))
    for m in re.finditer(rf"\b({NUMBER}) ([a-z]{{3,}}s)\b", body):
        found.append((f"How many {m[2]}: {body[: m.start()]}___ {m[2]}{body[m.end() :]}?", m[1]))
    spans = GAP.findall(sentence)
    if spans:
        found += [
            ("Fill the gap: " + sentence.replace(s, "___", 1), s)
            for s in [x for x in spans if not x[0].islower()] or spans
        ]
    return found


class WildSlots(Slots):
    """Slots whose names are made of pieces and words of the vocabulary: such names can only be copied, not guessed."""

    def __init__(self, rng: random.Random, pieces: list[str], whole: list[str]) -> None:
        super().__init__(rng, "train")
        self.pieces, self.whole = pieces, whole

    def _word(self) -> str:
        if self.rng.random() < 0.4:
            return self.rng.choice(self.whole).capitalize()
        found = ""
        while len(found) < 4 or (len(found) < 8 and self.rng.random() < 0.5):
            found += self.rng.choice(self.pieces)
        return found.capitalize()

    def _person(self) -> Person:
        male = self.rng.random() < 0.5
        first = self._pick("common_male" if male else "common_female") if self.rng.random() < 0.4 else self._word()
        return Person.make(first, self._word(), male)

    def _stem(self) -> str:
        return self._word()

    _place = _region = _river = _stem

    def _org(self) -> str:
        return f"{self._word()} {self._pick('org_end')}"

    def _product(self) -> str:
        return self._word()

    def _title(self) -> str:
        return self.rng.choice((f"The {self._word()} {self._pick('title_noun')}", f"The {self._word()} {self._word()}"))


class Corpus:
    """Documents by kind. `progress` in [0, 1] moves from short contexts and copying drills to the full mixture."""

    def __init__(self, tokenizer: Tokenizer, folder: Path | None, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        self.seed = seed
        vocabulary = sorted(tokenizer.get_vocab())
        self.pieces = [t for t in vocabulary if re.fullmatch("[a-z]{1,5}", t)]
        self.whole = [t[1:] for t in vocabulary if re.fullmatch("Ġ[A-Za-z]?[a-z]{3,8}", t)]
        self.qa = load_qa(folder, TRAIN_SETS) if folder else {}
        self.prose = load_prose(folder) if folder else {}
        self.forbidden = evaluation_ngrams(folder)
        for name, groups in self.qa.items():
            self.qa[name] = [g for g in groups if self.forbidden.isdisjoint(word_ngrams(g[0]))]
        self.facts = [(s, f) for s in worlds.known_world() for f in s.facts]

    # --- kinds of documents: each returns segments without the opening BOS -------------------------------------

    def world(self, slots: Slots, progress: float) -> list[Segment]:
        """A text about one or two subjects and questions on it; sometimes one about a subject that is not there."""
        rng = slots.rng
        domain = rng.choice(worlds.domains())
        most = 3 if progress < 0.12 else 6 if progress < 0.6 else 9
        items = [worlds.subject(slots, domain, rng.randint(1, most)) for _ in range(2 if rng.random() < 0.2 else 1)]
        text = "\n\n".join(worlds.render(i, rng, extras=0.0 if progress < 0.12 else 0.35) for i in items)
        pairs = [self._fact_pair(rng, i, f) for i in items for f in i.facts]
        rng.shuffle(pairs)
        if progress > 0.4 and rng.random() < 0.15:
            pairs.insert(rng.randint(0, 2), self._unanswerable(slots, domain))
        return self._ask(rng, text, pairs, progress)

    def scene(self, slots: Slots, progress: float) -> list[Segment]:
        item = worlds.passage(slots, slots.rng.choice(worlds.scenes()))
        pairs = [(slots.rng.choice(q), a) for q, a in item.qa]
        slots.rng.shuffle(pairs)
        return self._ask(slots.rng, item.text, pairs, progress)

    def real(self, slots: Slots, progress: float) -> list[Segment]:
        text, pairs = self._real_group(slots.rng)
        if slots.rng.random() < 0.1 and len(text) < 900:  # a second passage in front or behind: find the right one
            other = self._real_group(slots.rng)[0]
            if len(other) < 900:
                text = f"{text}\n\n{other}" if slots.rng.random() < 0.5 else f"{other}\n\n{text}"
        return self._ask(slots.rng, text, slots.rng.sample(pairs, len(pairs)), progress)

    def author(self, slots: Slots, progress: float) -> list[Segment]:
        """Write question-answer pairs about a context, the library's own instruction in front."""
        rng = slots.rng
        kind = rng.random()
        if kind < 0.4 or not self.qa:
            domain = rng.choice(worlds.domains())
            item = worlds.subject(slots, domain, rng.randint(2, 8))
            text = worlds.render(item, rng)
            pairs = [
                self._fact_pair(rng, item, f, wrap=False)
                for f in item.facts
                for _ in range(2 if rng.random() < 0.3 else 1)
            ]
        elif kind < 0.75:
            filled = worlds.passage(slots, rng.choice(worlds.scenes()))
            text, pairs = filled.text, [(rng.choice(q), a) for q, a in filled.qa]
        elif kind < 0.85 and self.prose:
            text = self._real_group(rng, FACTUAL)[0] if rng.random() < 0.5 else self._excerpt(rng, 700)
            made = [questions_by_rule(s) for s in self._sentences(rng, text)]
            pairs = [rng.choice(asked) for m in made if (asked := [p for p in m if not p[0].startswith("Fill")])]
            if len(pairs) < 2:
                return self.plain(slots, progress)
        else:
            text, pairs = self._real_group(rng, names=("fairytaleqa_train", "squad2_dev_half_answerable", "xquad_en"))
        pairs = list(dict(pairs).items())
        if rng.random() < 0.5:
            rng.shuffle(pairs)
        known: list[tuple[str, str]] = []
        if len(pairs) > 3 and rng.random() < 0.35:
            cut = rng.randint(1, len(pairs) - 2)
            known, pairs = pairs[:cut], pairs[cut:]
        instruction = INSTRUCTION.replace("{n}", str(len(pairs) if rng.random() < 0.7 else rng.choice((5, 8, 10, 15))))
        if known:
            instruction += "\n" + AGAIN.replace("{existing}", "\n".join(q for q, _ in known)).strip()
        written = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
        return [
            (USER, 0),
            (f"Context: {text}\n\n", W_CONTEXT),
            (instruction, 0.05),
            (ASSISTANT, 0),
            (written, W_PAIRS),
            (END, W_PAIRS),
        ]

    def blind(self, slots: Slots, progress: float) -> list[Segment]:
        """Questions without a context: on the known world the true answer, on others a plausible one."""
        rng = slots.rng
        segments: list[Segment] = []
        for _ in range(rng.randint(3, 9)):
            if rng.random() < 0.8:
                item, fact = rng.choice(self.facts)
                pair, weight = self._fact_pair(rng, item, fact), 2.0
            else:
                pair, weight = self._unanswerable(slots, rng.choice(worlds.domains())), W_BLIND
            segments += [(USER, 0), (pair[0], W_QUESTION), (ASSISTANT, 0), (pair[1], weight), (END, 0.5)]
        return segments

    def plain(self, slots: Slots, progress: float) -> list[Segment]:
        """Prose, a text of the known world, or two unrelated passages one after the other."""
        rng = slots.rng
        if not self.prose or rng.random() < 0.2:
            item = (
                rng.choice(worlds.known_world())
                if rng.random() < 0.5
                else worlds.subject(slots, rng.choice(worlds.domains()), 6)
            )
            return [(worlds.render(item, rng), W_PROSE), (END, W_PROSE)]
        text = self._excerpt(rng, rng.choice((400, 800, 1200)))
        if rng.random() < 0.15:
            text = worlds.render(worlds.subject(slots, rng.choice(worlds.domains()), 4), rng) + "\n\n" + text
        return [(text, W_PROSE), (END, W_PROSE)]

    def drill(self, slots: Slots, progress: float) -> list[Segment]:
        """Copying: a list given twice, or keys with values and then the values asked for."""
        rng = slots.rng
        kinds = ("person", "place", "product", "org", "year", "int:10-9000", "color", "food", "job", "street")
        n = rng.randint(3, 12)
        keys = [slots.draw(rng.choice(kinds[:4])) for _ in range(n)]
        if rng.random() < 0.5:
            again = keys if rng.random() < 0.5 else rng.sample(keys, n)
            return [(", ".join(keys) + ".", 0.3), ("\n" + ", ".join(again) + ".", 1.5), (END, 0.5)]
        kind = rng.choice(kinds)
        values = [slots.draw(kind) for _ in keys]
        sign = rng.choice((": ", " is ", " = ", " - "))
        segments: list[Segment] = [
            (USER, 0),
            ("Context: " + "\n".join(f"{k}{sign}{v}" for k, v in zip(keys, values, strict=True)) + "\n\n", 0.3),
        ]
        for i in rng.sample(range(n), min(n, 5)):
            segments += [(keys[i] + "?", 0.1), (ASSISTANT, 0), (values[i], 2.0), (END, 0.5), (USER, 0)]
        return segments[:-1]

    def cloze(self, slots: Slots, progress: float) -> list[Segment]:
        """Prose with one of its sentences again, a name or number taken out: the model finds it in the text."""
        rng = slots.rng
        if not self.prose:
            text = worlds.render(worlds.subject(slots, rng.choice(worlds.domains()), 6), rng)
        elif self.qa and rng.random() < 0.4:
            text = self._real_group(rng, FACTUAL)[0]
        else:
            text = self._excerpt(rng, rng.choice((300, 500, 800)))
        pairs = []
        for sentence in self._sentences(rng, text)[:6]:
            made = questions_by_rule(sentence)
            asked = [p for p in made if not p[0].startswith("Fill")]
            if asked or made:
                question, answer = rng.choice(asked if asked and rng.random() < 0.7 else made)
                wording = rng.choice(("Fill the gap: ", "What belongs in the gap? ", "Complete: "))
                pairs.append((question.replace("Fill the gap: ", wording), answer))
        return self._ask(rng, text, pairs, progress) if pairs else self.plain(slots, progress)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _fact_pair(
        self, rng: random.Random, item: worlds.Subject, fact: worlds.Fact, wrap: bool = True
    ) -> tuple[str, str]:
        if fact.relation.back and rng.random() < 0.15:
            return fact.ask(rng.choice(fact.relation.back), item.name), worlds.capital(item.name)
        question = fact.ask(rng.choice(fact.relation.questions("known")), item.name)
        if wrap and rng.random() < 0.08:
            question = (
                rng.choice(
                    ("Please answer: ", "Quick question: ", "Using the text, answer: ", "I would like to know: ")
                )
                + question
            )
        return question, fact.answer

    def _unanswerable(self, slots: Slots, domain: worlds.Domain) -> tuple[str, str]:
        item = worlds.subject(slots, domain, 1)
        return self._fact_pair(slots.rng, item, item.facts[0])

    def _real_group(self, rng: random.Random, names: tuple[str, ...] = ()) -> tuple[str, list[tuple[str, str]]]:
        weights = {
            "babi_en_train": 0.08,
            "fairytaleqa_train": 0.42,
            "policyqa_dev": 0.1,
            "pubmedqa_pqal_cv": 0.02,
            "squad2_dev_half_answerable": 0.18,
            "xquad_en": 0.2,
        }
        chosen = [n for n in self.qa if not names or n in names]
        name = rng.choices(chosen, [weights[n] for n in chosen])[0]
        return rng.choice(self.qa[name])

    def _sentences(self, rng: random.Random, text: str) -> list[str]:
        found = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n", text)]
        found = [s for s in found if 30 <= len(s) <= 220 and s[0].isupper() and s[-1] in ".!?"]
        return rng.sample(found, len(found))

    def _excerpt(self, rng: random.Random, characters: int) -> str:
        name = rng.choices(
            list(self.prose),
            [
                {"standard_ebooks": 5, "plain_prose": 2.5, "python_peps": 0.7, "country_introductions": 1.5}[n]
                for n in self.prose
            ],
        )[0]
        text = rng.choice(self.prose[name])
        start = rng.randrange(max(1, len(text) - characters))
        border = max(text.rfind(". ", 0, start), text.rfind("\n", 0, start))
        start = border + 1 if border >= 0 else 0
        end = text.find(". ", start + characters)
        found = text[start : end + 1 if end >= 0 else start + characters].strip()
        return found if self.forbidden.isdisjoint(word_ngrams(found)) else self._excerpt(rng, characters)

    def _ask(self, rng: random.Random, text: str, pairs: list[tuple[str, str]], progress: float) -> list[Segment]:
        """A chat: the context with the first question, then further questions as further turns."""
        label = "Context" if rng.random() < 0.9 else rng.choice(("Text", "Passage", "Document", "Read this"))
        segments: list[Segment] = [(USER, 0), (f"{label}: {text}\n\n", W_CONTEXT)]
        for question, answer in pairs[: 2 if rng.random() < 0.3 else 6]:
            segments += [(question, W_QUESTION), (ASSISTANT, 0), (answer, W_ANSWER), (END, 1.0), (USER, 0)]
        return segments[:-1]

    def _mixture(self, progress: float) -> list[tuple[Any, float]]:
        early = progress < 0.08
        real = 1.0 if self.qa else 0.0
        if early:
            return [(self.drill, 0.3), (self.world, 0.45), (self.scene, 0.05), (self.plain, 0.15), (self.cloze, 0.05)]
        if progress < 0.45:  # copying first: what is read cannot be answered before it can be copied
            return [
                (self.drill, 0.12),
                (self.world, 0.36),
                (self.scene, 0.19),
                (self.real, 0.1 * real),
                (self.author, 0.06),
                (self.blind, 0.07),
                (self.plain, 0.05),
                (self.cloze, 0.05),
            ]
        return [
            (self.drill, 0.05),
            (self.world, 0.27),
            (self.scene, 0.18),
            (self.real, 0.09 * real),
            (self.author, 0.2),
            (self.blind, 0.15),
            (self.plain, 0.02),
            (self.cloze, 0.04),
        ]

    def document(self, rng: random.Random, progress: float) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of one document, BOS first."""
        kinds, shares = zip(*self._mixture(progress), strict=True)
        segments = rng.choices(kinds, shares)[0](self.slots(rng, progress), progress)
        ids, weights = [self.ids[BOS]], [0.0]
        for text, weight in segments:
            piece = [self.ids[text]] if text in self.ids else self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += [weight] * len(piece)
        return ids, weights

    def slots(self, rng: random.Random, progress: float) -> Slots:
        """Composed names; once copying is learned mostly names that cannot be guessed."""
        wild = progress > 0.45 and rng.random() < WILD
        return WildSlots(rng, self.pieces, self.whole) if wild else Slots(rng, "train")

    def batch(self, step: int, rows: int, length: int, progress: float) -> tuple[np.ndarray, np.ndarray]:
        """ids and weights, both [rows, length]: whole documents packed into rows, the rest PAD with weight 0."""
        rng = random.Random(f"{self.seed}/{step}")
        ids = np.full((rows, length), self.ids[PAD], dtype=np.int64)
        weights = np.zeros((rows, length), dtype=np.float32)
        room, misses = [length] * rows, 0
        while misses < 6:
            doc, w = self.document(rng, progress)
            if len(doc) > length:
                continue
            row = next((r for r in range(rows) if room[r] >= len(doc)), None)
            if row is None:
                misses += 1
                continue
            at = length - room[row]
            ids[row, at : at + len(doc)] = doc
            weights[row, at : at + len(doc)] = w
            room[row] -= len(doc)
        return ids, weights


def tokenizer_texts(folder: Path | None, seed: int = 1, count: int = 30_000) -> list[str]:
    """Texts to train the tokenizer on: the same kinds in about the same shares."""
    rng = random.Random(seed)
    slots = Slots(rng, "train")
    texts: list[str] = []
    prose = [t for group in load_prose(folder).values() for t in group] if folder else []
    qa = [g for group in load_qa(folder, TRAIN_SETS[1:]).values() for g in group] if folder else []
    for _ in range(count):
        item = worlds.subject(slots, rng.choice(worlds.domains()), 5)
        texts.append(worlds.render(item, rng))
        filled = worlds.passage(slots, rng.choice(worlds.scenes()))
        texts += [filled.text, *(q[0] for q, _ in filled.qa[:3])]
    for text in prose:
        texts.append(text)
    for text, pairs in qa:
        texts += [text, *(q for q, _ in pairs)]
    texts += [w for group in words().values() for w in group]
    return texts
