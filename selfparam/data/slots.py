"""Fictional values: names, numbers, dates and words, composed so that evaluation names are new.

Names are built from syllables. A name belongs to the split "test" when its hash is 0 modulo 4, otherwise to
"train": pretraining never meets a name that an evaluation uses. Refuses to know sentences and models.
"""

from __future__ import annotations

import json
import random
import zlib
from functools import cache
from importlib import resources
from typing import Literal

Split = Literal["train", "test"]


@cache
def words() -> dict[str, list[str]]:
    """Word lists by kind; `copper-coloured` is written with a space."""
    text = resources.files("selfparam.data").joinpath("worlds/words.json").read_text("utf-8")
    return {
        kind: [w.replace("-", " ") if kind in ("color", "tool", "vehicle", "drink") else w for w in line.split()]
        for kind, line in json.loads(text).items()
    }


def split_of(name: str) -> Split:
    """Which split a composed name belongs to (a stable hash)."""
    return "test" if zlib.crc32(name.encode()) % 4 == 0 else "train"


class Person(str):
    """A full name with the parts that templates ask for: {p.first} {p.last} {p.he} {p.him} {p.his}."""

    he: str
    him: str
    his: str

    @classmethod
    def make(cls, first: str, last: str, male: bool) -> Person:
        person = cls(f"{first} {last}")
        person.he, person.him, person.his = ("he", "him", "his") if male else ("she", "her", "her")
        return person

    @property
    def first(self) -> str:
        return self.split()[0]

    @property
    def last(self) -> str:
        return self.split()[-1]

    @property
    def He(self) -> str:  # noqa: N802 - the name is what templates say
        return self.he.capitalize()

    @property
    def Him(self) -> str:  # noqa: N802
        return self.him.capitalize()

    @property
    def His(self) -> str:  # noqa: N802
        return self.his.capitalize()


def _number(value: int) -> str:
    return f"{value:,}" if value >= 1000 else str(value)


class Slots:
    """Draws values of every kind with one random generator; names only from one split."""

    def __init__(self, rng: random.Random, split: Split = "train") -> None:
        self.rng = rng
        self.split = split
        self._names = {
            "person": self._person,
            "place": self._place,
            "region": self._region,
            "river": self._river,
            "street": self._street,
            "org": self._org,
            "title": self._title,
            "product": self._product,
        }

    def draw(self, kind: str) -> str:
        """A value of the kind (see the word list and the methods). Raises KeyError for an unknown kind."""
        name, _, argument = kind.partition(":")
        if name in self._names:
            return self._new_name(name)
        if name == "choice":
            return self.rng.choice([option.strip() for option in argument.split("|") if option.strip()])
        if name in ("int", "money"):
            low, high = (int(float(part.replace(",", "").strip("$ "))) for part in argument.rsplit("-", 1))
            number = _number(self._integer(low, high))
            return f"${number}" if name == "money" else number
        if name == "year":
            return str(self.rng.randint(1702, 2024) if self.rng.random() < 0.5 else self.rng.randint(1900, 2024))
        if name == "date":
            day, month, year = self.rng.randint(1, 28), self.draw("month"), self.draw("year")
            return self.rng.choice(
                [f"{day} {month} {year}", f"{month} {day}, {year}", f"{day} {month}", f"{month} {day}"]
            )
        if name == "time":
            hour, minute = self.rng.randint(1, 12), self.rng.choice(["00", "15", "30", "45", "10", "20", "40", "05"])
            return self.rng.choice([f"{hour}:{minute} am", f"{hour}:{minute} pm", f"{hour + 9}:{minute}"])
        if name == "percent":
            return f"{self.rng.randint(2, 98)} {'percent' if self.rng.random() < 0.6 else 'per cent'}"
        return self.rng.choice(words()[name])

    def _integer(self, low: int, high: int) -> int:
        value = self.rng.randint(low, high)
        if high - low > 5000 and self.rng.random() < 0.5:
            value = max(low, value // 100 * 100)
        return value

    def _new_name(self, kind: str) -> str:
        while True:
            name = self._names[kind]()
            if split_of(name) == self.split:
                return name

    def _pick(self, key: str) -> str:
        return self.rng.choice(words()[key])

    def _person(self) -> Person:
        male = self.rng.random() < 0.5
        gender = "male" if male else "female"
        if self.rng.random() < 0.25:
            first = self._pick(f"common_{gender}")
        else:
            middle = self._pick("person_mid") if self.rng.random() < 0.5 else ""
            first = self._pick("person_start") + middle + self._pick(f"{gender}_end")
        return Person.make(first, self._pick("last_start") + self._pick("last_end"), male)

    def _stem(self) -> str:
        return self._pick("place_start") + (self._pick("place_mid") if self.rng.random() < 0.6 else "")

    def _place(self) -> str:
        name = self._stem() + self._pick("place_end")
        return (
            f"{self.rng.choice(['Upper', 'Lower', 'New', 'Port', 'Great', 'West', 'Saint'])} {name}"
            if self.rng.random() < 0.1
            else name
        )

    def _region(self) -> str:
        return self._stem() + self._pick("region_end")

    def _river(self) -> str:
        return self._stem() + self._pick("river_end")

    def _street(self) -> str:
        return f"{self._pick('street_first')} {self._pick('street_end')}"

    def _org(self) -> str:
        stem = (
            self._stem().capitalize() if self.rng.random() < 0.4 else self._pick("last_start") + self._pick("last_end")
        )
        return f"{stem} {self._pick('org_end')}"

    def _title(self) -> str:
        adjective, noun = self._pick("title_adj"), self._pick("title_noun")
        forms = [
            f"The {adjective} {noun}",
            f"The {noun} of {self._stem()}{self._pick('place_end')}",
            f"{adjective} {noun}",
            f"{self._pick('title_noun')} and {noun}",
            f"A {noun} for {self._pick('person_start')}{self._pick('female_end')}",
        ]
        return self.rng.choice(forms)

    def _product(self) -> str:
        name = self._pick("product_start") + self._pick("product_end")
        return f"{name} {self.rng.randint(2, 900)}" if self.rng.random() < 0.25 else name
