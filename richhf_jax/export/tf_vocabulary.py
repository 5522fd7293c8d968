"""SentencePiece encoding in TensorFlow's own operations, for SavedModels served without tensorflow-text.

All texts of a call are one row of bytes, each text after a mark; "▁" is a single byte in it, a space. Both
steps of SentencePiece find all strings of a trie at all positions of the row at once:

    normalisation   the longest rule at each position; what the rules write is the next row
    segmentation    every piece at each position; the most probable path through them (Viterbi)

Only the Viterbi loop goes byte by byte, through all texts together. It adds scores in the order and the
precision of SentencePiece 0.2.3, so that ties are decided alike. The copy of SentencePiece in tensorflow-text
2.21 decides some otherwise ("a" "aa" or "aa" "a", both as probable): 1 in 1,000 lines of program code.

The ids are SentencePiece's (no difference in 85,000 texts), but for malformed UTF-8: a malformed sequence is
here one U+FFFD that is normalised as any other, there each of its bytes is one that isn't.
"""

from collections.abc import Mapping

import numpy as np
import sentencepiece
import tensorflow as tf
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2

from richhf_jax import errors

_ESCAPED_SPACE = "▁".encode()
_SPACE = ord(" ")
# Before each text. No byte of UTF-8, so that no piece goes past it.
_MARK = 0xFF
# By a character's first byte; 0 for the bytes after it.
_CHARACTER_LENGTHS = np.array([1] * 128 + [0] * 64 + [2] * 32 + [3] * 16 + [4] * 8 + [1] * 8, np.int32)
# SentencePiece's: how much less probable an unknown character is than the least probable piece.
_UNKNOWN_PENALTY = np.float32(10)
_Type = sentencepiece_model_pb2.ModelProto.SentencePiece


class StockVocabulary(tf.Module):
    """A SentencePiece unigram model's encoding in TensorFlow's own operations.

    Its tables are constants: there is no resource that a SavedModel would have to track.
    """

    def __init__(self, model: bytes):
        """Takes a serialised SentencePiece ModelProto.

        Raises:
          errors.UserError: it is none, or it encodes in a way that isn't supported here.
        """
        super().__init__()
        try:
            self.eos_id = sentencepiece.SentencePieceProcessor(model_proto=model).eos_id()
            proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        except (RuntimeError, message.DecodeError) as error:
            raise errors.UserError(f"no SentencePiece model can be read ({error})") from error
        _check(proto)
        pieces = list(enumerate(proto.pieces))
        symbols = {i: piece.piece.encode() for i, piece in pieces if piece.type == _Type.USER_DEFINED}
        normal = {i: piece.piece.encode() for i, piece in pieces if piece.type == _Type.NORMAL}
        self._normalize = _Normalizer(proto.normalizer_spec, list(symbols.values()))
        # None with a space is ever found: texts have "▁" instead.
        found = {text: i for i, text in (normal | symbols).items() if b" " not in text}
        self._trie = _Trie({text.replace(_ESCAPED_SPACE, b" "): i for text, i in found.items()})

        # One more than there are pieces: the last stands for "no piece".
        scores = np.array([piece.score for _, piece in pieces] + [-np.inf], np.float32)
        lowest, highest = scores[list(normal)].min(), scores[list(normal)].max()
        self._unknown = next(i for i, piece in pieces if piece.type == _Type.UNKNOWN)
        scores[self._unknown] = lowest - _UNKNOWN_PENALTY
        # About 0, as SentencePiece takes no number below the smallest positive one for the highest score.
        highest = max(highest, np.finfo(np.float32).tiny)
        for i, symbol in symbols.items():
            scores[i] = len(symbol) * highest - 0.1
        self._scores = tf.constant(scores)
        self._byte_ids = None
        if proto.trainer_spec.byte_fallback:
            ids = {piece.piece: i for i, piece in pieces if piece.type == _Type.BYTE}
            self._byte_ids = tf.constant([ids[f"<0x{byte:02X}>"] for byte in range(256)], tf.int32)

    # Traced once, however often it is used.
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def encode_tf(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """String [n] -> int32 ragged [n, pieces], without EOS: as seqio.SentencePieceVocabulary.encode_tf."""
        # Small operations by the thousand: an accelerator would be waited for at each.
        with tf.device("CPU"):
            row = self._normalize(texts)
            matches = self._matches(row)
            lengths = self._best_lengths(matches, row)
            # From each text's last byte back to its mark, piece by piece. A mark has length 0.
            is_last_byte = tf.concat([row, [_MARK]], 0)[1:] == _MARK
            is_end = _reached(tf.range(tf.size(row)) - lengths, is_last_byte) & (row != _MARK)
            ends = _indices(is_end)
            lengths, text_of = tf.gather(lengths, ends), tf.gather(_text_of(row), ends)
            starts = ends - lengths + 1
            ids = tf.gather_nd(matches, tf.stack([starts, lengths - 1], 1))
            if self._byte_ids is None:
                ids, text_of = self._merge_unknown(ids, text_of)
            else:
                # Byte by byte.
                counts = tf.where(ids == self._unknown, lengths, 1)
                spelt = tf.gather(self._byte_ids, tf.gather(row, _ranges(starts, counts)))
                ids, text_of = tf.repeat(ids, counts), tf.repeat(text_of, counts)
                ids = tf.where(ids == self._unknown, spelt, ids)
            return tf.RaggedTensor.from_value_rowids(
                ids, tf.cast(text_of, tf.int64), tf.size(texts, tf.int64), validate=False
            )

    def _merge_unknown(self, ids: tf.Tensor, text_of: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Unknown characters in a row, of the same text, are one piece."""
        is_again = (ids == self._unknown) & (_previous(ids, -1) == ids) & (_previous(text_of, -1) == text_of)
        return ids[~is_again], text_of[~is_again]

    def _matches(self, row: tf.Tensor) -> tf.Tensor:
        """The pieces at each byte, by their length: int32 [bytes, longest piece]."""
        length = tf.where(row == _MARK, 0, tf.gather(_CHARACTER_LENGTHS, row))
        # At least as wide as an unknown character is long.
        is_character = tf.one_hot(length - 1, max(self._trie.depth, 4), True, False)
        unmatched = tf.where(is_character, self._unknown, tf.size(self._scores) - 1)
        positions, lengths, pieces = self._trie.find(row, length > 0)
        return tf.tensor_scatter_nd_update(unmatched, tf.stack([positions, lengths - 1], 1), pieces)

    def _best_lengths(self, matches: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        """Length of the last piece of the most probable path to each byte: int32 [bytes], 0 for marks."""
        marks = _indices(row == _MARK)
        ends = tf.concat([marks, [tf.size(row)]], 0)[1:]
        steps = tf.reduce_max(tf.concat([ends - marks - 1, [1]], 0))
        count, width = tf.size(marks), matches.shape[1]

        def step(i, best, ahead, lengths, last_pieces):
            # best [texts, 1]: score of the path to byte i; ahead [texts, width]: to the bytes after it.
            # Beyond a text's end is another's; what is found there is not looked at.
            pieces = tf.gather(matches, tf.minimum(marks + 1 + i, tf.size(row) - 1))
            scores = tf.gather(self._scores, pieces) + best
            is_better = scores > ahead
            ahead = tf.where(is_better, scores, ahead)
            lengths = tf.where(is_better, tf.range(1, width + 1), lengths)
            last_pieces = last_pieces.write(i, lengths[:, 0])
            best, ahead = ahead[:, :1], tf.pad(ahead[:, 1:], [[0, 0], [0, 1]], constant_values=-np.inf)
            return i + 1, best, ahead, tf.pad(lengths[:, 1:], [[0, 0], [0, 1]]), last_pieces

        ahead = tf.fill([count, width], -np.float32(np.inf))
        last_pieces = tf.TensorArray(tf.int32, steps, element_shape=[None])
        start = (0, tf.zeros([count, 1]), ahead, tf.zeros([count, width], tf.int32), last_pieces)
        *_, last_pieces = tf.while_loop(lambda i, *_: i < steps, step, start)
        text_of = _text_of(row)
        into_text = tf.range(tf.size(row)) - tf.gather(marks, text_of) - 1
        lengths = tf.gather_nd(last_pieces.stack(), tf.stack([tf.maximum(into_text, 0), text_of], 1))
        return tf.where(into_text < 0, 0, lengths)


class _Normalizer:
    """SentencePiece's normalisation: texts -> the row of their bytes, a mark before each."""

    def __init__(self, spec: sentencepiece_model_pb2.NormalizerSpec, symbols: list[bytes]):
        rules = {b" ": b" ", _ESCAPED_SPACE: _ESCAPED_SPACE} | _charsmap_rules(spec.precompiled_charsmap)
        # User-defined symbols stay as they are, even where a longer rule starts with one.
        rules = {key: text for key, text in rules.items() if not key.startswith(tuple(symbols))}
        mark = bytes([_MARK])
        rules |= {symbol: symbol for symbol in symbols} | {mark: mark + b" " * spec.add_dummy_prefix}
        self._trie = _Trie({key: i for i, key in enumerate(rules)})
        texts = [text.replace(_ESCAPED_SPACE, b" ") for text in rules.values()]
        lengths = np.array([len(text) for text in texts])
        self._written = tf.constant(np.frombuffer(b"".join(texts), np.uint8), tf.int32)
        self._lengths = tf.constant(lengths, tf.int32)
        self._starts = tf.constant(np.cumsum(lengths) - lengths, tf.int32)
        # Only these are ever dropped, not a "▁" that the text itself has.
        spaces = [len(text) - len(text.lstrip(b" ")) for text in rules.values()]
        self._leading_spaces = tf.constant(spaces, tf.int32)
        ends_in_space = [text.endswith(b" ") or key == mark for key, text in rules.items()]
        self._ends_in_space = tf.constant(ends_in_space)

    def __call__(self, texts: tf.Tensor) -> tf.Tensor:
        """String [n] -> int32 [bytes]."""
        texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8")
        joined = tf.strings.reduce_join(tf.constant(bytes([_MARK])) + texts)
        row = tf.cast(tf.io.decode_raw(joined, tf.uint8), tf.int32)
        position, length = tf.range(tf.size(row)), tf.gather(_CHARACTER_LENGTHS, row)
        positions, lengths, rules = self._trie.find(row, length > 0)
        length = tf.tensor_scatter_nd_max(length, positions[:, None], lengths)
        is_longest = lengths == tf.gather(length, positions)
        rule = tf.fill(tf.shape(row), -1)
        rule = tf.tensor_scatter_nd_update(rule, positions[is_longest][:, None], rules[is_longest])
        is_read = _reached(position + length, row == _MARK)

        # Slices of `source` are written; a character without a rule is its own.
        source = tf.concat([row, self._written], 0)
        has_rule, rule = rule >= 0, tf.maximum(rule, 0)
        start = tf.where(has_rule, tf.size(row) + tf.gather(self._starts, rule), position)
        length = tf.where(has_rule, tf.gather(self._lengths, rule), length)
        spaces = tf.where(has_rule, tf.gather(self._leading_spaces, rule), 0)
        ends_in_space = has_rule & tf.gather(self._ends_in_space, rule)
        written = _indices(is_read & (length > 0))
        start, length, spaces = (tf.gather(values, written) for values in (start, length, spaces))
        spaces = tf.where(_previous(tf.gather(ends_in_space, written), False), spaces, 0)
        row = tf.gather(source, _ranges(start + spaces, length - spaces))

        # Of the spaces at a text's end none is left: neither a "▁" of its own nor the one put before it.
        text_of, position = _text_of(row), tf.range(tf.size(row))
        last = tf.math.unsorted_segment_max(tf.where(row == _SPACE, 0, position), text_of, tf.size(texts))
        return row[position <= tf.gather(last, text_of)]


class _Trie:
    """Finds byte strings at every position of a row of bytes."""

    def __init__(self, keys: Mapping[bytes, int]):
        # The nodes are the keys' prefixes, in an order that sorts the edges; edge i leads to node i + 1.
        prefixes = {key[:end] for key in keys for end in range(len(key) + 1)}
        nodes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
        number = {prefix: i for i, prefix in enumerate(nodes)}
        self._edges = tf.constant([number[prefix[:-1]] * 256 + prefix[-1] for prefix in nodes[1:]], tf.int32)
        self._values = tf.constant([keys.get(prefix, -1) for prefix in nodes], tf.int32)
        self.depth = len(nodes[-1])

    def find(self, row: tf.Tensor, starts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """All keys that begin where `starts` is true: their positions, lengths and values, int32 [keys]."""
        row = tf.pad(row, [[0, self.depth]], constant_values=_MARK)
        position = _indices(starts)
        node, hits = tf.zeros_like(position), []
        for length in range(1, self.depth + 1):
            wanted = node * 256 + tf.gather(row, position + length - 1)
            edge = tf.searchsorted(self._edges, wanted)
            # Few go on: those that don't are not looked at again.
            on = _indices(tf.gather(self._edges, tf.minimum(edge, tf.size(self._edges) - 1)) == wanted)
            position, node = tf.gather(position, on), tf.gather(edge, on) + 1
            hits.append((position, tf.fill(tf.shape(position), length), tf.gather(self._values, node)))
        positions, lengths, values = (tf.concat(column, 0) for column in zip(*hits, strict=True))
        is_key = values >= 0
        return positions[is_key], lengths[is_key], values[is_key]


def _reached(jumps: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """Which positions are reached from the seeds (bool) by any number of jumps: bool [bytes].

    In log(bytes) rounds, as each doubles the jumps.
    """
    size = tf.size(jumps)

    def double(count, reached, jumps):
        onward = tf.math.unsorted_segment_max(tf.cast(reached, tf.int32), jumps, size + 1)
        return 2 * count, reached | (onward > 0), tf.gather(jumps, jumps)

    # One more position: where jumps out of the row end.
    start = (1, tf.concat([seeds, [False]], 0), tf.concat([jumps, [size]], 0))
    _, reached, _ = tf.while_loop(lambda count, *_: count <= size, double, start)
    return reached[:-1]


def _indices(mask: tf.Tensor) -> tf.Tensor:
    """[False, True, True] -> [1, 2]."""
    return tf.cast(tf.where(mask)[:, 0], tf.int32)


def _previous(values: tf.Tensor, first: int | bool) -> tf.Tensor:
    """[4, 5, 6], 0 -> [0, 4, 5]."""
    return tf.concat([[first], values], 0)[:-1]


def _ranges(starts: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """[3, 7], [2, 3] -> [3, 4, 7, 8, 9]."""
    return tf.ragged.range(starts, starts + lengths).flat_values


def _text_of(row: tf.Tensor) -> tf.Tensor:
    """The index of the text that each byte, or mark, belongs to."""
    return tf.cumsum(tf.cast(row == _MARK, tf.int32)) - 1


def _charsmap_rules(charsmap: bytes) -> dict[bytes, bytes]:
    """The rules of a precompiled normalisation: a double array (of the library Darts), then their texts."""
    if not charsmap:
        return {}
    size = int.from_bytes(charsmap[:4], "little")
    units, texts = np.frombuffer(charsmap, "<u4", size // 4, offset=4), charsmap[4 + size :]
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    labels = np.arange(1, 256, dtype=np.uint32)
    rules, nodes = {}, [(b"", 0)]
    while nodes:
        key, node = nodes.pop()
        base = node ^ int(offsets[node])
        if units[node] & 0x100:
            start = int(units[base]) & 0x7FFFFFFF
            rules[key] = texts[start : texts.index(b"\0", start)]
        following = labels[units[base ^ labels] & 0x800000FF == labels]
        nodes += [(key + bytes([label]), base ^ label) for label in following.tolist()]
    return rules


def _check(proto: sentencepiece_model_pb2.ModelProto) -> None:
    """Raises UserError for what StockVocabulary doesn't express."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "it is no unigram model": trainer.model_type != trainer.UNIGRAM,
        "it puts whitespace at the ends of words": trainer.treat_whitespace_as_suffix,
        "it keeps repeated whitespace": not normalizer.remove_extra_whitespaces,
        "it doesn't escape whitespace": not normalizer.escape_whitespaces,
        "it has no piece for the end of a text": trainer.eos_id < 0,
        "it has no piece for whitespace": all(piece.piece != "▁" for piece in proto.pieces),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise errors.UserError(
            f"this SentencePiece model can't be encoded without tensorflow-text: {reason}; "
            "export a model that takes tokens instead of prompts"
        )
