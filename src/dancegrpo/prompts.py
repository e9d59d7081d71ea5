"""Prompts: what a run is asked to draw, where it is read from, and in which order groups are formed.

Files are read once, for validation and an index of 8 bytes per prompt; a prompt is then fetched from the disk when it
is asked for. A million prompts cost no memory.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dancegrpo.errors import PromptError
from dancegrpo.prompt_images import CHECKED, Reference, check_image, find_image, held, open_image
from dancegrpo.prompt_pairs import CHOSEN, PICK_A_PIC, PairFields

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prompt:
    """One request to the generator. Groups are known by integer ids, never by text.

    image: the reference of image-to-video: a file, or a PIL picture. pair: what was preferred as the answer to this
    request, and what it was preferred to: files, or their bytes.
    """

    id: int
    text: str
    negative: str = ""
    image: Path | Image | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[Reference, Reference] | None = None

    def request(self) -> tuple[str, str, str]:
        """All that encoding depends on: the text, the negative one and a sha256 of the image ("" without one).

        Raises PromptError where the image's file cannot be read.
        """
        return self.text, self.negative, "" if self.image is None else self._image_digest(self.image)

    def _image_digest(self, image: Path | Image) -> str:
        if isinstance(image, Path):
            try:
                return hashlib.sha256(image.read_bytes()).hexdigest()
            except OSError as error:
                raise PromptError(f"image {image} cannot be read ({error.strerror}): put it back") from error
        # Beside the pixels, what decides how they look: a palette, the transparent colour, the side that is up.
        shown = image.mode, image.size, image.getpalette(None), image.info.get("transparency"), image.getexif().get(274)
        return hashlib.sha256(repr(shown).encode() + image.tobytes()).hexdigest()


def json_value(value: Any) -> Any:
    """NumPy's numbers and arrays, and dates, which tables bring, as JSON's: a `default` of `json.dumps`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


class PromptSource(ABC):
    """A fixed, indexable list of prompts; the prompt at index i has id i. ties: pairs left out as undecided."""

    ties: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Prompt:
        """The prompt at 0 <= index < len; IndexError elsewhere. Raises PromptError when the file has changed."""

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @property
    def first_without_image(self) -> str | None:
        """Where the first prompt without a reference image stands, as "FILE line 3"; None where each has one."""
        return next((f"prompt {prompt.id}" for prompt in self if prompt.image is None), None)

    def check_index(self, index: int) -> None:
        """Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")


class MissingColumnError(PromptError):
    """A record, or a table, without the field of the text."""


class MereText(dict[str, Any]):
    """The record of a line or a string, which never had a field but its text: `prompts.at_most` takes it whole."""


@dataclass(frozen=True)
class Fields:
    """How a record becomes a prompt: `column` holds the text, `image` its image; `negative`, `metadata` are so named.

    negative: for records that bring none of their own. image: None = images are not looked at. folder: what relative
    paths of them start from; by_name: there they may also be found by their file name alone. unique, at_most: which
    records are left out, see `open_prompts`. pair: where two pictures to learn from are; None = records have none.
    """

    column: str = "text"
    negative: str = ""
    folder: Path = Path()
    image: str | None = "image"
    by_name: bool = False
    unique: bool = False
    at_most: Mapping[str, float] = field(default_factory=dict)
    pair: PairFields | None = None

    @property
    def media(self) -> tuple[str, ...]:
        """The fields that hold pictures."""
        return (() if self.image is None else (self.image,)) + (() if self.pair is None else self.pair.sides)

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields of a table whose empty cells are told from missing ones."""
        return self.column, *(() if self.pair is None else self.pair.names)

    def prompt(
        self, index: int, record: Mapping[str, Any], where: str, *, opening: bool = False, unread: Collection[str] = ()
    ) -> Prompt:
        """Fields of other names join the metadata, where `metadata` itself comes first. PromptError names `where`.

        A record in GenEval's form (`tag` and `include`) gets its tag as `task` too. opening: the record is only
        checked, its image not decoded; unread: fields of pictures that were left where they lie.
        """
        self.require([*record, *unread] if unread else record, where)
        text, negative = record[self.column], record.get("negative")
        if text is not None and not isinstance(text, str):
            raise PromptError(f"{where}: {self.column}={text!r} is not text: put the prompt in quotes")
        if not text or not text.strip():
            raise PromptError(f"{where} has an empty {self.column!r}: write a prompt or delete the record")
        if negative is not None and not isinstance(negative, str):
            raise PromptError(f"{where}: negative={negative!r} is not text: put it in quotes")
        known = (self.column, "negative", self.image, "metadata", *(() if self.pair is None else self.pair.names))
        others = {name: value for name, value in record.items() if name not in known}
        metadata = {**others, **self._metadata(record.get("metadata"), where)}
        if "task" not in metadata and "include" in metadata and isinstance(metadata.get("tag"), str):
            # GenEval's records call it `tag`; evaluations give a rate for each `task`.
            metadata["task"] = metadata["tag"]
        own = self.negative if negative is None else negative
        image, pair = self._image(index, self.reference(record), where, opening), None
        if self.pair is not None and opening:
            self.pair.check(record, self.find(where), where, header=index < CHECKED, unread=unread)
        elif self.pair is not None:
            pair = self.pair.references(record, self.find(where), where)
        return Prompt(index, text, own, image, metadata, pair)

    def reference(self, record: Mapping[str, Any]) -> Any:
        """What a record's image field holds; None without one."""
        return None if self.image is None else record.get(self.image)

    def wanted(self, record: Mapping[str, Any], where: str) -> bool:
        """Whether `at_most`, and for empty texts `unique`, leave a record in. PromptError where it cannot be said."""
        published = self.unique or self.pair is PICK_A_PIC
        if published and self.column in record and not str(record[self.column] or "").strip():
            return False
        if isinstance(record, MereText):
            return True
        return all(self._number(record, name, where) <= bound for name, bound in self.at_most.items())

    def _number(self, record: Mapping[str, Any], name: str, where: str) -> float:
        try:
            return float(record[name])
        except KeyError:
            had = ", ".join(record)
            told = f"{where} has no field {name!r} (it has {had})"
            raise PromptError(f"{told}: mend prompts.at_most, or give the record its number") from None
        except (TypeError, ValueError):
            told = f"{where}: {name}={record[name]!r} is not a number"
            raise PromptError(f"{told}: prompts.at_most compares numbers") from None

    def key(self, record: Mapping[str, Any]) -> int:
        """64 bits that two records share if they ask for the same: text, negative and image, and have the same pair."""
        pair = () if self.pair is None else self.pair.held(record)
        told = repr((str(record[self.column]).strip(), record.get("negative"), self.reference(record), *pair))
        return int.from_bytes(hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

    def require(self, names: Collection[str], where: str) -> None:
        """names: the fields of a record, or a table. Raises PromptError: MissingColumnError without the text's own."""
        if self.column not in names:
            told = f"{where} has no field {self.column!r} (it has {', '.join(names) or 'none'})"
            raise MissingColumnError(f"{told}: set prompts.column to the right one")
        if self.pair is not None:
            self.pair.require(names, where)

    def find(self, where: str) -> Callable[[Any], Reference | None]:
        """`find_image` of what a field of this record holds."""
        return lambda value: find_image(value, self.folder, where, by_name=self.by_name)

    def _image(self, index: int, value: Any, where: str, opening: bool) -> Path | Image | None:
        image = self.find(where)(value)
        if image is None:
            return None
        if not opening:
            return open_image(image, where)
        if index < CHECKED:
            check_image(image, where)
        return None

    @staticmethod
    def _metadata(value: Any, where: str) -> Mapping[str, Any]:
        if isinstance(value, str) and value:
            # A table's cell holds only text.
            try:
                value = json.loads(value)
            except ValueError as error:
                raise PromptError(f"{where}: metadata {value[:40]!r} is not JSON: {error}") from error
        if value and not isinstance(value, Mapping):
            raise PromptError(f"{where}: metadata {value!r} must be a mapping")
        return value or {}


class Selection:
    """The positions of the records that `fields` leaves in, 8 bytes each, in their order; each record is checked.

    unread: fields of pictures that the records come without. first_without_image: the place of the first record that
    has none. ties: records left out for that their pair is undecided.
    """

    def __init__(self, fields: Fields, unread: Collection[str] = ()) -> None:
        self.first_without_image: str | None = None
        self.ties = 0
        self._fields, self._unread, self._positions, self._keys = fields, unread, array("Q"), array("Q")

    def offer(self, position: int, record: Mapping[str, Any], where: str) -> None:
        """Raises PromptError, which starts with `where`, for a record that is no prompt."""
        if not self._fields.wanted(record, where):
            return
        if self._fields.pair is not None:
            self._fields.require([*record, *self._unread], where)
            if self._fields.pair.tie(record, where):
                self.ties += 1
                return
        self._fields.prompt(len(self._positions), record, where, opening=True, unread=self._unread)
        if self.first_without_image is None and held(self._fields.reference(record)) is None:
            self.first_without_image = where
        self._positions.append(position)
        if self._fields.unique:
            self._keys.append(self._fields.key(record))

    def positions(self, name: str) -> np.ndarray:
        """(prompts,) uint64; of records that ask for the same, the first. PromptError where none is left in."""
        found = np.asarray(self._positions)
        if not len(found):
            if self.ties:
                raise PromptError(f"{name} holds only ties ({self.ties}): none of them is a pair to learn from")
            left = "none within prompts.at_most" if self._fields.at_most else "write at least one"
            raise PromptError(f"{name} holds no prompts: {left}")
        if self._fields.unique:
            # Sorting needs no more memory than the index; a set of a million texts would need a hundred times that.
            _, first = np.unique(np.asarray(self._keys), return_index=True)
            found = found[np.sort(first)]
        return found


class PromptList(PromptSource):
    """Prompts that are in memory already."""

    def __init__(self, prompts: Sequence[Prompt], negative: str = "") -> None:
        self._prompts = [replace(p, id=i, negative=p.negative or negative) for i, p in enumerate(prompts)]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        self.check_index(index)
        return self._prompts[index]


PUBLISHED = {"hpd": "prompt", "pickapic": "caption", "vidprom": "prompt", "consisid": "cap"}
"""Public prompt sets, and the field that holds the text in each; `prompt_sets` says more."""
PAIRED = {"preferences": CHOSEN, "pickapic-pairs": PICK_A_PIC}
"""Pairs of pictures of which one is preferred, and the fields that hold them."""
SHAPES = ("shapes", "shapes-video", "shapes-i2v", "shapes-t2i")
"""Worlds of drawn prompts."""


def open_prompts(
    source: str,
    *,
    column: str = "text",
    negative: str = "",
    image: str | None = "image",
    images: str | None = None,
    unique: bool = False,
    at_most: Mapping[str, float] | None = None,
) -> PromptSource:
    """The prompts of a .txt/.json/.jsonl/.csv/.parquet file, `hf:DATASET[:SPLIT]`, `images:FOLDER` or `shapes:train`.

    The shapes world has captions of drawings (`shapes`), of clips (`shapes-video`) and of their stills (`shapes-t2i`),
    and first frames to set in motion (`shapes-i2v`), each as `:train` and `:heldout`; `shapes:many` has more than
    10,000 different captions to train on. `hpd:`, `pickapic:`, `vidprom:` and `consisid:` before a file or a dataset
    read it as that prompt set is published (see `prompt_sets`). `preferences:` and `pickapic-pairs:` before one read
    pairs of pictures to learn from (see `prompt_sets.open_pairs`).

    column: the field that holds the text (not in .txt). negative: for prompts that bring no negative one of their own.
    image: the field that holds the reference image; None = none does. images: the folder its paths start from, or lie
    in by their file names alone; None = the prompt file's. unique: leave out empty texts and repeated prompts.
    at_most: leave out records in which one of these fields exceeds its bound; mere texts (the lines of .txt, the
    strings of a JSON list) are taken whole, a record that lacks a field is refused.
    Every record is checked now; raises PromptError, one line with file and line, for the first one that is unusable.
    """
    kind, colon, rest = source.partition(":")
    if kind in SHAPES:
        return _shapes(kind, rest, negative)
    folder = None if images is None else Path(images).expanduser()
    if folder is not None and not folder.is_dir():
        raise PromptError(f"prompts.images={images} is not a folder: name the one that holds the images")
    fields = Fields(column, negative, folder or Path(), image, folder is not None, unique, at_most or {})
    if colon and kind in PUBLISHED:
        from dancegrpo.prompt_sets import open_published

        _require_name(kind, rest, "FILE")
        return open_published(kind, rest, fields)
    if colon and kind in PAIRED:
        from dancegrpo.prompt_sets import open_pairs

        _require_name(kind, rest, "FILE")
        return open_pairs(kind, rest, fields)
    return open_records(source, fields)


def brings_pairs(source: str) -> bool:
    """Whether the prompts of `source` come with a `pair` each."""
    return source.partition(":")[0] in PAIRED


def open_records(source: str, fields: Fields) -> PromptSource:
    """The prompts of a file, a dataset or a folder of images: see `open_prompts`."""
    kind, colon, rest = source.partition(":")
    if colon and kind == "hf":
        from dancegrpo.prompt_tables import HubDataset

        # The first colon ends the name: a split may have its own, as in train[:100].
        name, _, split = rest.partition(":")
        _require_name(kind, name, "DATASET[:SPLIT]")
        return HubDataset(name, split or "train", fields)
    if colon and kind == "images":
        from dancegrpo.prompt_sets import ImageFolder

        _require_name(kind, rest, "FOLDER")
        return ImageFolder(Path(rest).expanduser(), fields)
    from dancegrpo.prompt_files import FILES

    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (*FILES, ".parquet"):
        forms = f"a {', '.join(FILES)} or .parquet file, hf:DATASET[:SPLIT], images:FOLDER"
        sets, worlds = (", ".join(f"{name}:" for name in names) for names in ((*PUBLISHED, *PAIRED), SHAPES))
        more = f"one of them after {sets}; or {worlds} with train or heldout; or shapes:many"
        raise PromptError(f"prompts {source!r} are of no known form: use {forms}; {more}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PromptError(f"prompt file {path} {what}: name a {suffix} file")
    fields = fields if fields.by_name else replace(fields, folder=path.parent)
    if suffix == ".parquet":
        from dancegrpo.prompt_tables import ParquetFile

        return ParquetFile(path, fields)
    return FILES[suffix](path, fields)


def _require_name(kind: str, name: str, form: str) -> None:
    if not name.strip():
        raise PromptError(f"{kind}: names nothing: write {kind}:{form}")


def _shapes(kind: str, split: str, negative: str) -> PromptSource:
    if (kind, split) == ("shapes", "many"):
        from dancegrpo.shapes.wordings import many_prompts

        return PromptList(many_prompts(), negative)
    if split not in ("train", "heldout"):
        what = f"{kind}:{split} does not exist" if split else f"prompts {kind!r} name no split"
        many = ", or shapes:many to train on" if kind == "shapes" else ""
        raise PromptError(f"{what}: use {kind}:train or {kind}:heldout{many}")
    part: Literal["train", "heldout"] = "train" if split == "train" else "heldout"
    if kind == "shapes":
        from dancegrpo.shapes.scenes import prompts

        return PromptList(prompts(part), negative)
    from dancegrpo.shapes.clips import clip_prompts, i2v_prompts, still_prompts

    forms = {"shapes-video": clip_prompts, "shapes-i2v": i2v_prompts, "shapes-t2i": still_prompts}
    return forms[kind](part, negative=negative)
