"""A store: a folder with immutable, content-addressed snapshots of one model, and a head that names one of them.

    store.json            format version, limits of the guard, whether texts are kept
    head.json             the head and every move it made; replaced atomically
    snapshots/ID.json     a manifest; ID is the SHA-256 of its bytes
    objects/ab/abcd…      files of snapshots, named by the SHA-256 of their bytes, shared between snapshots
    models/ID/            links to the objects of a snapshot: a model directory that transformers loads
    work/                 what is being written, and the injection in progress

A commit writes objects, then the manifest, then the head, each flushed before the next: a crash leaves the old head or
the new one. One process writes at a time (lock). Refuses to know models: files in, files out. Source: git's object
model; the layout is ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from selfparam.disk import json_bytes, reason, sha256_of, sync, write_whole
from selfparam.errors import OutputError, StoreError
from selfparam.store.directory import check_out, drop_remains
from selfparam.store.guard import Limits

FORMAT = 1
SETTINGS, HEAD = "store.json", "head.json"
_HEX = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")
_FOLDERS = ("objects", "snapshots", "models", "work")
_BESIDE = ("adapter/", "curvature/", "texts/")
_LARGEST_MANIFEST = 100_000_000  # bytes


@dataclass(frozen=True)
class Snapshot:
    """An immutable θ' and its lineage. files: name -> (SHA-256, bytes). record: what was injected, how, how well."""

    id: str
    parent: str | None
    created: str
    files: dict[str, tuple[str, int]]
    record: dict[str, Any]

    @property
    def faults(self) -> list[str]:
        """Why the guard refused it; empty where it passed."""
        return [str(one) for one in self.record.get("guard", {}).get("faults", [])]

    @property
    def forced(self) -> bool:
        return bool(self.record.get("guard", {}).get("forced"))

    @property
    def refused(self) -> bool:
        """Kept aside: it did not pass and nobody insisted."""
        return bool(self.faults) and not self.forced

    def part(self, folder: str) -> dict[str, tuple[str, int]]:
        """The files below a folder ("adapter", "curvature", "texts"), or of the model itself ("")."""
        if not folder:
            return {name: file for name, file in self.files.items() if not name.startswith(_BESIDE)}
        return {name: file for name, file in self.files.items() if name.startswith(folder + "/")}


@dataclass(frozen=True)
class Freed:
    """What gc took away."""

    snapshots: int
    files: int
    bytes: int


def is_store(folder: str | Path) -> bool:
    return (Path(folder) / SETTINGS).is_file()


@contextmanager
def new_store(path: str | Path, *, limits: Limits, keep_texts: bool = False, needed: int = 0) -> Iterator[Store]:
    """A store to fill, built beside its place and renamed when the block ends well; otherwise nothing is left.

    Raises OutputError where `path` is taken or cannot be written.
    """
    check_out(path, needed=needed)
    home = Path(path).resolve()
    beside = home.with_name(f".{home.name}.{secrets.token_hex(4)}.tmp")
    settings = {"format": FORMAT, "created": now(), "keep_texts": keep_texts, "limits": limits.as_dict()}
    with _writing(path):
        try:
            for name in _FOLDERS:
                (beside / name).mkdir(parents=True)
            write_whole(beside / SETTINGS, json_bytes(settings))
            write_whole(beside / HEAD, json_bytes({"head": None, "moves": []}))
            with Store.open(beside).writing() as store:
                yield store
            if home.is_dir():
                home.rmdir()
            beside.rename(home)
            with suppress(OSError):
                sync(home.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _writing(what: str | Path) -> Iterator[None]:
    """OSErrors of the block as one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write to '{what}' ({reason(error)}): make room, or check its permissions; "
                          "what was there before is still there") from error


@dataclass(frozen=True)
class Store:
    """An open store. Reading needs no lock; whatever writes does so inside `with store.writing():`."""

    path: Path
    limits: Limits
    keep_texts: bool
    lock: FileLock = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Raises StoreError: no store, a damaged one, or one of a later format."""
        path = Path(folder).resolve()
        if not is_store(path):
            if (path / "config.json").is_file():
                raise StoreError(f"'{folder}' is no store but a model directory: make a store of it with "
                                 f"'selfparam init STORE --model {folder}'")
            raise StoreError(f"'{folder}' is no store: make one with 'selfparam init {folder} --model MODEL'")
        settings = _json(path / SETTINGS)
        version = settings.get("format")
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"'{path / SETTINGS}' is damaged (no format version): restore it from a copy")
        if version > FORMAT:
            raise StoreError(f"'{folder}' has format {version}, this selfparam reads up to {FORMAT}: "
                             "install a newer one")
        try:
            limits = Limits.of(settings.get("limits", {}))
        except ValueError as error:
            raise StoreError(f"'{path / SETTINGS}': {error}: correct it") from error
        lock = FileLock(path / "lock", fallback_to_soft=False, preserve_lock_file=True)
        return cls(path, limits, settings.get("keep_texts") is True, lock)

    @contextmanager
    def writing(self) -> Iterator[Store]:
        """Hold the lock. Raises StoreError where another process holds it, OutputError where nothing can be written."""
        with _writing(self.path):
            try:
                self.lock.acquire(timeout=0.2)
            except Timeout as error:
                raise StoreError(f"another process is writing to '{self.path.name}': wait until it has finished, "
                                 "then run the command again") from error
        try:
            with _writing(self.path):
                yield self
        finally:
            self.lock.release()

    @property
    def typed(self) -> str:
        """Its path as one can type it here."""
        return shlex.quote(os.path.relpath(self.path))

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def head(self) -> str | None:
        return self._head()[0]

    @property
    def moves(self) -> list[dict[str, Any]]:
        """Every move of the head, oldest first: at, to, by, forced."""
        return self._head()[1]

    def _head(self) -> tuple[str | None, list[dict[str, Any]]]:
        found = _json(self.path / HEAD)
        head, moves = found.get("head"), found.get("moves")
        if (head is not None and not _is_id(head)) or not isinstance(moves, list):
            raise StoreError(f"'{self.path / HEAD}' is damaged: restore it from a copy")
        return head, moves

    def ids(self) -> list[str]:
        """Ids of all snapshots, refused ones too."""
        names = (path.name for path in (self.path / "snapshots").glob("*.json"))
        return sorted(name[:-5] for name in names if _is_id(name[:-5]))

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first, parents before their children."""
        found = {one: self.snapshot(one) for one in self.ids()}
        depth: dict[str, int] = {}
        for one in found:
            chain = [one]
            while (parent := found[chain[-1]].parent) in found and parent not in depth:
                chain.append(parent or "")
            below = depth.get(parent or "", -1)
            for up, name in enumerate(reversed(chain)):
                depth[name] = below + 1 + up
        return sorted(found.values(), key=lambda s: (depth[s.id], s.created, s.id))

    def find(self, name: str = "") -> Snapshot:
        """By id, by the first digits of one, or the head (""). Raises StoreError when there is none, or several."""
        if name in ("", "head"):
            head = self.head
            if head is None:
                raise StoreError(f"'{self.path.name}' has no head: make the store again")
            return self.snapshot(head)
        fits = [one for one in self.ids() if len(name) >= 4 and one.startswith(name.lower())]
        if len(fits) != 1:
            raise StoreError(f"{len(fits) or 'no'} snapshots begin with '{name}': give at least 4 digits of one that "
                             "'selfparam log --all' shows")
        return self.snapshot(fits[0])

    def snapshot(self, id: str) -> Snapshot:
        """The manifest of an id. Raises StoreError where it is missing, altered or names what is outside the store."""
        path = self.path / "snapshots" / f"{id}.json"
        if not _is_id(id):
            raise StoreError(f"'{id[:80]}' is no id of a snapshot: look at 'selfparam log'")
        try:
            with path.open("rb") as stream:
                data = stream.read(_LARGEST_MANIFEST + 1)
        except OSError as error:
            raise StoreError(f"the snapshot {id[:12]} cannot be read ({reason(error)}): restore '{path}' from a copy"
                             ) from error
        if hashlib.sha256(data).hexdigest() != id:
            raise StoreError(f"the snapshot {id[:12]} was altered: restore '{path}' from a copy")
        manifest = _parsed(data, path)
        files, parent, record = manifest.get("files"), manifest.get("parent"), manifest.get("record")
        created = manifest.get("created")
        sound = isinstance(files, dict) and isinstance(record, dict) and isinstance(created, str)
        if not sound or not (parent is None or _is_id(parent)) or manifest.get("format") != FORMAT:
            raise StoreError(f"'{path}' is no manifest of format {FORMAT}: restore it from a copy, "
                             "or install a newer selfparam")
        assert isinstance(files, dict) and isinstance(record, dict) and isinstance(created, str)
        for name, file in files.items():
            if not is_safe(name):
                raise StoreError(f"the snapshot {id[:12]} names the file '{_shown(name)}', which would leave the "
                                 "folder: do not use this store")
            if not (isinstance(file, list) and len(file) == 2 and _is_id(file[0]) and isinstance(file[1], int)):
                raise StoreError(f"'{path}' is damaged (the file '{_shown(name)}'): restore it from a copy")
        return Snapshot(id, parent, created, {name: (file[0], file[1]) for name, file in files.items()}, record)

    def lineage(self, id: str | None = None) -> list[Snapshot]:
        """The snapshot (default: the head) and its ancestors, oldest first. Raises StoreError for a broken line."""
        found = [self.find(id or "")]
        while (parent := found[-1].parent) is not None:
            found.append(self.snapshot(parent))
        return found[::-1]

    def object(self, sha: str) -> Path:
        return self.path / "objects" / sha[:2] / sha

    def missing(self, snapshot: Snapshot) -> list[str]:
        """Names of the snapshot's files that are not in the store (gc may have dropped weights)."""
        return [name for name, (sha, size) in snapshot.files.items() if not _has_size(self.object(sha), size)]

    def text(self, snapshot: Snapshot, name: str) -> str:
        """A text file of a snapshot. Raises StoreError."""
        try:
            return self.sound(snapshot, name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"'{name}' of snapshot {snapshot.id[:12]} cannot be read ({reason(error)}): "
                             "restore it from a copy") from error

    def sound(self, snapshot: Snapshot, name: str) -> Path:
        """Where a file of a snapshot lies. Raises StoreError where it is missing or altered."""
        sha, _ = snapshot.files[name]
        path = self.object(sha)
        try:
            if sha256_of(path) != sha:
                raise StoreError(f"'{name}' of snapshot {snapshot.id[:12]} was altered: restore it from a copy")
            return path
        except OSError as error:
            raise StoreError(f"'{name}' of snapshot {snapshot.id[:12]} cannot be read ({reason(error)}): "
                             "restore it from a copy") from error

    # --- writing (inside `writing`) -----------------------------------------------------------------------------

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A folder to write in that is gone afterwards."""
        path = self.path / "work" / f"tmp-{secrets.token_hex(6)}"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, folder: Path, record: dict[str, Any], *, parent: str | None, by: str) -> Snapshot:
        """Take the files of `folder` (moved, not copied) as a new snapshot; it becomes the head unless refused.

        Raises OutputError, StoreError; the head is then what it was.
        """
        with self.writing():
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): self._put(path) for path in paths}
            manifest = {"format": FORMAT, "parent": parent, "created": now(), "record": record,
                        "files": {name: list(file) for name, file in files.items()}}
            data = json_bytes(manifest)
            id = hashlib.sha256(data).hexdigest()
            write_whole(self.path / "snapshots" / f"{id}.json", data)
            snapshot = self.snapshot(id)
            self.view(snapshot)
            if not snapshot.refused:
                self.move_head(snapshot, by=by, forced=snapshot.forced)
        return snapshot

    def _put(self, path: Path) -> tuple[str, int]:
        """Move a file among the objects; one that is there and sound stays. Returns (SHA-256, bytes)."""
        if not is_safe(path.name):
            raise StoreError(f"a file named '{_shown(path.name)}' cannot be kept: rename it")
        sha, size = sha256_of(path), path.stat().st_size
        place = self.object(sha)
        if _has_size(place, size) and sha256_of(place) == sha:
            return sha, size
        place.parent.mkdir(exist_ok=True)
        path.chmod(0o444)
        sync(path)
        path.replace(place)
        sync(place.parent)
        sync(place.parent.parent)
        return sha, size

    def adopt(self, folder: Path, snapshot: Snapshot) -> list[str]:
        """Take those files of `folder` that the snapshot misses and that have its hashes; names still missing."""
        with self.writing():
            for name in self.missing(snapshot):
                path = folder / name
                if path.is_file() and sha256_of(path) == snapshot.files[name][0]:
                    self._put(path)
        return self.missing(snapshot)

    def view(self, snapshot: Snapshot) -> Path:
        """models/ID: the model's files as links to the objects. Raises StoreError where one is not in the store."""
        place = self.path / "models" / snapshot.id
        files = snapshot.part("")
        if place.is_dir() and all(_has_size(place / name, size) for name, (_, size) in files.items()):
            return place
        if any(name in files for name in self.missing(snapshot)):
            raise StoreError(f"the weights of snapshot {snapshot.id[:12]} are not in the store: "
                             "run 'selfparam verify' on it")
        with _writing(self.path), self.room() as room:
            for name, (sha, _) in files.items():
                link = room / "model" / name
                link.parent.mkdir(parents=True, exist_ok=True)
                # relative to its later place: models/ID/… is as deep below the store as work/tmp-…/model/… less one
                up = "/".join([".."] * (2 + name.count("/")))
                link.symlink_to(f"{up}/objects/{sha[:2]}/{sha}")
            shutil.rmtree(place, ignore_errors=True)
            (room / "model").rename(place)
            sync(place.parent)
        return place

    def move_head(self, snapshot: Snapshot, *, by: str, forced: bool = False) -> None:
        """Name another head, in one step; every move stays written down."""
        with self.writing():
            moves = [*self.moves, {"at": now(), "to": snapshot.id, "by": by, "forced": forced}]
            write_whole(self.path / HEAD, json_bytes({"head": snapshot.id, "moves": moves}))

    # --- looking after ------------------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """What is wrong, a line each: hashes of manifests and files, parents, the head. Reads every byte."""
        found: list[str] = []
        ids = self.ids()
        sound: dict[str, Snapshot] = {}
        for id in ids:
            try:
                sound[id] = self.snapshot(id)
            except StoreError as error:
                found.append(str(error))
        checked: dict[str, str] = {}
        for one in sound.values():
            if one.parent is not None and one.parent not in ids:
                found.append(f"the parent {one.parent[:12]} of snapshot {one.id[:12]} is missing")
            for name, (sha, size) in one.files.items():
                if sha not in checked:
                    checked[sha] = _fault(self.object(sha), sha, size)
                if checked[sha] and not (checked[sha] == "is missing" and self.can_miss(one, name)):
                    found.append(f"'{name}' of snapshot {one.id[:12]} {checked[sha]}")
        try:
            head = self.head
            if head not in sound:
                found.append(f"the head {str(head)[:12]} is no sound snapshot")
        except StoreError as error:
            found.append(str(error))
        return found

    def can_miss(self, snapshot: Snapshot, name: str) -> bool:
        """A file that gc may take: it can be made again, or (curvature) the next injection does without it."""
        return self.rebuildable(snapshot, name) or name.startswith("curvature/")

    def rebuildable(self, snapshot: Snapshot, name: str) -> bool:
        """A weight file that can be made again of the parent and the LoRA delta."""
        return snapshot.parent is not None and bool(snapshot.part("adapter")) and name in snapshot.part("") \
            and name.endswith(".safetensors")

    def gc(self, *, everything: bool = False, weights: Sequence[Snapshot] = ()) -> Freed:
        """Remove what no snapshot needs: leavings of crashes, files without a snapshot.

        everything: also snapshots that are neither the head nor its ancestors (refused or rolled back).
        weights: snapshots whose full weights and curvature go too, because their delta makes the weights again (the
        caller has tried it).
        """
        with self.writing():
            all_of = {one: self.snapshot(one) for one in self.ids()}  # a damaged store is not touched
            line = {one.id for one in self.lineage()}
            gone = [one for one in all_of if everything and one not in line]
            for one in reversed(self.snapshots()):
                if one.id in gone:
                    (self.path / "snapshots" / f"{one.id}.json").unlink()
            sync(self.path / "snapshots")
            kept = [all_of[one] for one in all_of if one not in gone]
            dropped = {one.id for one in weights}
            needed = {sha for one in kept for name, (sha, _) in one.files.items()
                      if one.id not in dropped or not self.can_miss(one, name)}
            files, freed = self._sweep(needed)
            for place in (self.path / "models").iterdir():
                if place.name not in all_of or place.name in {*gone, *dropped}:
                    shutil.rmtree(place, ignore_errors=True)
            self.tidy()
        return Freed(len(gone), files, freed)

    def _sweep(self, needed: set[str]) -> tuple[int, int]:
        files = freed = 0
        for path in sorted((self.path / "objects").glob("*/*")):
            if path.name not in needed:
                freed += path.stat().st_size
                path.unlink()
                files += 1
        return files, freed

    def tidy(self) -> None:
        """Remove what a crash left in work/ and beside manifests; the injection in progress stays."""
        for path in (self.path / "work").glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)
        drop_remains(self.unfinished)
        for path in (*self.path.glob(".*.tmp"), *(self.path / "snapshots").glob(".*.tmp")):
            with suppress(OSError):
                path.unlink()

    @property
    def unfinished(self) -> Path:
        """Where the injection in progress lives."""
        return self.path / "work" / "injection"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_safe(name: object) -> bool:
    """A relative path of plain names that stays below its folder."""
    return isinstance(name, str) and 0 < len(name) < 500 and all(_PART.fullmatch(part) for part in name.split("/"))


def _is_id(value: object) -> bool:
    return isinstance(value, str) and bool(_HEX.fullmatch(value))


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:80])


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _fault(path: Path, sha: str, size: int) -> str:
    if not os.path.lexists(path):
        return "is missing"
    try:
        return "" if _has_size(path, size) and sha256_of(path) == sha else "was altered"
    except OSError as error:
        return f"cannot be read ({reason(error)})"


def _json(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes(), path)
    except OSError as error:
        raise StoreError(f"cannot read '{path}' ({reason(error)}): check its permissions") from error


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"'{path}' is damaged ({reason(error)}): restore it from a copy") from error
    if not isinstance(found, dict):
        raise StoreError(f"'{path}' is damaged (no JSON object): restore it from a copy")
    return found

