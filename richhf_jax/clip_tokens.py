"""CLIP's tokens: byte-pair encoding by the `tokenizers` library, from the files of a checkpoint.

'A red STAR' -> [start, a</w>, red</w>, star</w>, end, 0, ...]

A text is made lower case, composed (NFC), and its spaces are joined; a regular expression splits it into
words, numbers and signs; and each of them, as bytes, is merged by the vocabulary's rules. These steps are
made here, as transformers makes them. Only the vocabulary itself is read from tokenizer.json: the ids, the
merges and tokens that were added. An older checkpoint has vocab.json and merges.txt instead. What else
OpenAI's code does before, mending broken Unicode by ftfy and HTML's `&amp;`, transformers doesn't either.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int32

from richhf_jax import errors, reading

START, END = "<|startoftext|>", "<|endoftext|>"
FILE = "tokenizer.json"
_OLDER_FILES = ("vocab.json", "merges.txt")
_END_OF_WORD = "</w>"
FIX = f"Take the {FILE} that was published with the weights"
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokens:
    """CLIP's vocabulary.

    Attributes:
      content: the vocabulary as a tokenizer.json, the same for every file that means the same.
      name: its path, for messages.
      start_id, end_id: ids of the two tokens around a text.
    """

    def __init__(self, content: bytes, name: str = FILE):
        """Loads a tokenizer.json.

        Args:
          content: what is in the file.
          name: its path, for messages.

        Raises:
          errors.UserError: it is damaged, or not CLIP's.
        """
        import tokenizers  # Only CLIP needs the library.

        self._bytes = tokenizers.decoders.ByteLevel()
        self.name = name
        try:
            read = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # The library raises no narrower one.
            raise errors.UserError(
                f"{name} is damaged, or no file of the tokenizers library: {error}. {FIX}"
            ) from error
        start, end = (read.token_to_id(token) for token in (START, END))
        if start is None or end is None:
            raise errors.UserError(f"{name} isn't CLIP's: its vocabulary has no {START} or no {END}. {FIX}")
        self.start_id, self.end_id = start, end
        self._ids: dict[str, int] = read.get_vocab()
        merges = self._checked_merges(json.loads(read.to_str())["model"].get("merges", []))
        added = [token for _, token in sorted(read.get_added_tokens_decoder().items())]
        self.content = build(self._ids, merges, [t for t in added if t.content not in (START, END)])
        self._tokenizer = tokenizers.Tokenizer.from_str(self.content.decode())

    def _checked_merges(self, merges: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
        """Checks the ids, and returns the pairs of pieces that become one, in order.

        CLIP's ids follow from the merges: [256 bytes, 256 bytes that end a word, merged pieces, start, end].
        """
        from tokenizers import pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        ends = (f"{byte}{_END_OF_WORD}" for byte in alphabet)
        for i, piece in enumerate([*alphabet, *ends, *map("".join, merges), START, END]):
            if self._ids.get(piece) != i:
                raise errors.UserError(
                    f"{self.name} isn't CLIP's, or is damaged: in it {piece!r} has the id"
                    f" {self._ids.get(piece)}, and not {i}, as CLIP's order has it (512 bytes, the pieces of"
                    f" {len(merges)} merges, {START}, {END}). {FIX}"
                )
        return [(left, right) for left, right in merges]

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    def is_same(self, other: "ClipTokens") -> bool:
        """Returns whether another file holds the same vocabulary, be it written in another way."""
        return self.content == other.content

    def has(self, ids: Mapping[str, int]) -> bool:
        """Returns whether tokens have these ids."""
        return ids.items() <= self._ids.items()

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token; None: there is no such token."""
        return self._tokenizer.token_to_id(token)

    def check_fits(self, rows: int, end_id: int | None) -> None:
        """Checks that the vocabulary is that of a network.

        Args:
          rows: number of rows of the network's table.
          end_id: the id at which the network pools a text; None: the highest.

        Raises:
          errors.UserError: it has another number of ids or another end, so it belongs to another model.
        """
        if self.size != rows:
            raise errors.UserError(
                f"{self.name} has {self.size} tokens, the model {rows}: it is another model's vocabulary."
                f" {FIX}"
            )
        pooled = rows - 1 if end_id is None else end_id
        if self.end_id != pooled:
            raise errors.UserError(
                f"{self.name} ends a text with the id {self.end_id}, the model looks for {pooled}: it is"
                f" another model's vocabulary. {FIX}"
            )

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "texts length"], Int32[np.ndarray, " texts"]]:
        """Encodes texts as CLIP does.

        A longer text is cut after `length` - 2 tokens, wherever that is in a word. What follows the end is 0.
        An end that is typed in a text stays there, and CLIP reads nothing behind it.

        Returns:
          The tokens; and of each text the number of words, between spaces, that are cut off at least partly.
          Of a text that begins with an end, CLIP reads none.
        """
        ids = np.zeros((len(texts), length), np.int32)
        words_cut = np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            pieces = encoded.ids
            kept = [self.start_id, *pieces[: length - 2], self.end_id]
            ids[row, : len(kept)] = kept
            typed = pieces.index(self.end_id) + 1 if self.end_id in pieces else len(pieces)
            # A text that begins with an end says nothing.
            read = 0 if typed == 1 and pieces[0] == self.end_id else min(typed, length - 2)
            if len(pieces) > read:
                first_cut = encoded.offsets[read][0]
                words_cut[row] = len(text[_start_of_word(text, first_cut) :].split())
        return ids, words_cut

    def pieces(self, text: str) -> list[int]:
        """Returns the ids of a text's pieces, without start and end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens up to their end, as CLIP reads it: lower case, in parts."""
        pieces = []
        for i in itertools.takewhile(lambda i: i != self.end_id, ids):
            if i != self.start_id:
                # A byte's own sign stands for a space.
                pieces.append((self._tokenizer.id_to_token(i) or "").replace(_END_OF_WORD, "Ġ"))
        return self._bytes.decode(pieces).strip()


def _start_of_word(text: str, place: int) -> int:
    """Returns the first character of the word, between spaces, that holds this one."""
    while place and not text[place - 1].isspace():
        place -= 1
    return place


def is_in(folder: epath.PathLike) -> bool:
    """Tells whether a directory has the files that `read` takes."""
    place = epath.Path(folder)
    return (place / FILE).exists() or all((place / name).exists() for name in _OLDER_FILES)


def read(path: epath.PathLike) -> ClipTokens:
    """Reads a tokenizer.json; or in a directory, that file, or vocab.json and merges.txt.

    Args:
      path: the file or directory; also vocab.json or merges.txt, which stand for their directory.

    Raises:
      errors.UserError: there is none, it is damaged, not CLIP's, or tokenizer.json and vocab.json differ.
    """
    place = epath.Path(path)
    if not place.exists():
        raise errors.UserError(
            f"{place} can't be read: No such file or directory. Give the path of a {FILE}, or of a directory"
            f" with it or with {' and '.join(_OLDER_FILES)}"
        )
    if place.name in _OLDER_FILES:
        place = place.parent
    if not place.is_dir():
        return ClipTokens(_read(place), str(place))
    vocabulary, merges = (place / name for name in _OLDER_FILES)
    if (place / FILE).exists():
        tokens = ClipTokens(_read(place / FILE), str(place / FILE))
        if vocabulary.exists() and not tokens.has(reading.read_json(vocabulary)):
            raise errors.UserError(
                f"{place / FILE} and {vocabulary.name} give tokens different ids: one is another model's."
                f" {FIX}, and remove {vocabulary.name}"
            )
        return tokens
    if not is_in(place):
        raise errors.UserError(f"{place} has no {FILE}, nor {' and '.join(_OLDER_FILES)}")
    ids = reading.read_json(vocabulary)
    lines = _read(merges).decode(errors="replace").splitlines()
    rules = (line.split() for line in lines if line and "#version:" not in line)
    try:
        content = build(ids, [(left, right) for left, right in rules])
    except Exception as error:  # The library raises no narrower one.
        raise errors.UserError(
            f"{merges} is damaged, or doesn't belong to {vocabulary.name}: {error}. {FIX}"
        ) from error
    return ClipTokens(content, str(vocabulary))


def _read(path: epath.Path) -> bytes:
    try:
        return reading.read_bytes(path)
    except OSError as error:
        raise errors.UserError(f"{path} can't be read: {error.strerror or error}") from error


def build(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Sequence[Any] = ()
) -> bytes:
    """Makes a tokenizer.json.

    Args:
      vocabulary: piece -> id.
      merges: the pairs of pieces that become one, in order.
      added: `tokenizers.AddedToken`s, pieces that are found in a text before all others, as a padding "!" is.

    Raises:
      Exception: a merge has a piece that isn't in the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    model = models.BPE(dict(vocabulary), list(merges), end_of_word_suffix=_END_OF_WORD, unk_token=END)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in (START, END) if token in vocabulary])
    tokenizer.add_tokens(list(added))
    return tokenizer.to_str().encode()
