"""Decoding compared with all sequences: the language models here are small enough to list them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from richhf_jax import decoding

EOS, VOCAB, LENGTH = 1, 5, 4


def follow(table):
    """A decoder whose next token depends on the current one: token t is followed by table[t]."""
    calls = []

    def tokens_to_logits(state):
        jax.debug.callback(lambda: calls.append(1))
        logits = 5.0 * jax.nn.one_hot(jnp.asarray(table)[state.cur_token[:, 0]], 6)
        return logits, {"steps": state.cache["steps"] + 1}

    return tokens_to_logits, calls


def greedy(table, batch=1, length=8):
    step, calls = follow(table)
    cache = {"steps": jnp.zeros((), jnp.int32)}
    tokens, log_probs = jax.jit(
        lambda: decoding.temperature_sample(jnp.zeros((batch, length), jnp.int32), cache, step)
    )()
    jax.effects_barrier()
    return np.asarray(tokens)[:, 0], np.asarray(log_probs)[:, 0], len(calls)


def test_follows_the_most_probable_tokens_until_the_end():
    tokens, log_probs, _ = greedy([2, 0, 3, 4, EOS, 0])
    np.testing.assert_array_equal(tokens, [[2, 3, 4, EOS, 0, 0, 0, 0]])
    # Four steps, each with probability e^5 / (e^5 + 5); nothing is counted after the end.
    np.testing.assert_allclose(log_probs, 4 * (5 - np.log(np.exp(5) + 5)), rtol=1e-5)


def test_stops_as_soon_as_every_sequence_has_ended():
    _, _, calls = greedy([2, 0, EOS, 0, 0, 0], batch=3)
    assert calls == 2


def test_a_sequence_that_never_ends_is_cut():
    tokens, _, calls = greedy([2, 0, 2, 0, 0, 0])
    np.testing.assert_array_equal(tokens, [[2] * 8])
    assert calls == 8


class PrefixModel:
    """A language model whose next token depends on everything before it, which only the cache remembers."""

    def __init__(self, rng, batch):
        # The hash of a prefix is its number in base VOCAB, modulo the table's rows.
        self.table = (2 * rng.normal(size=(batch, 997, VOCAB))).astype(np.float32)
        self.cache = {
            "hash": jnp.zeros(batch, jnp.int32),
            "row": jnp.arange(batch),
            "index": jnp.zeros((), int),
        }

    def tokens_to_logits(self, state):
        cache = state.cache
        prefix_hash = (cache["hash"] * VOCAB + state.cur_token[:, 0] + 1) % 997
        logits = jnp.asarray(self.table)[cache["row"], prefix_hash]
        return logits, cache | {"hash": prefix_hash, "index": cache["index"] + 1}

    def sequences(self, row):
        """Maps every complete or full-length sequence to its log-probability."""
        found = {}

        def extend(tokens, prefix_hash, log_prob):
            if len(tokens) == LENGTH or (tokens and tokens[-1] == EOS):
                found[tokens + (0,) * (LENGTH - len(tokens))] = log_prob
                return
            prefix_hash = (prefix_hash * VOCAB + (tokens[-1] if tokens else 0) + 1) % 997
            logits = self.table[row, prefix_hash].astype(np.float64)
            log_probs = logits - np.log(np.exp(logits).sum())
            for token in range(VOCAB):
                extend((*tokens, token), prefix_hash, log_prob + log_probs[token])

        extend((), 0, 0.0)
        return found

    def decode(self, decode_fn, **kwargs):
        inputs = jnp.zeros((len(self.table), LENGTH), jnp.int32)
        results = jax.jit(lambda: decode_fn(inputs, self.cache, self.tokens_to_logits, EOS, **kwargs))()
        return tuple(np.asarray(x) for x in results)


@pytest.fixture
def model(rng):
    return PrefixModel(rng, batch=3)


@pytest.mark.parametrize(
    ("penalty_fn", "alpha", "penalty_of"),
    [
        (decoding.brevity_penalty, 0.0, lambda length: 1),
        (decoding.brevity_penalty, 0.6, lambda length: ((5 + length) / 6) ** 0.6),
        (decoding.length_penalty, 2.0, lambda length: length**2),
    ],
)
def test_a_beam_search_wide_enough_finds_the_best_of_all_sequences(model, penalty_fn, alpha, penalty_of):
    tokens, scores = model.decode(decoding.beam_search, num_decodes=80, alpha=alpha, penalty_fn=penalty_fn)
    for row in range(len(tokens)):
        penalized = {
            seq: log_prob / penalty_of(seq.index(EOS) + 1 if EOS in seq else LENGTH)
            for seq, log_prob in model.sequences(row).items()
        }
        best = sorted(penalized, key=penalized.get)[-5:]
        assert [tuple(seq) for seq in tokens[row, -5:]] == best
        np.testing.assert_allclose(scores[row, -5:], [penalized[seq] for seq in best], rtol=1e-4)


def test_a_narrow_beam_search_step_by_step(model):
    tokens, scores = model.decode(decoding.beam_search, num_decodes=2, alpha=0.0)
    for row in range(len(tokens)):
        best = narrow_beam_search(model, row, beams=2)
        assert [tuple(seq) for seq in tokens[row]] == [seq for seq, _ in best]
        np.testing.assert_allclose(scores[row], [score for _, score in best], rtol=1e-4)


def narrow_beam_search(model, row, beams):
    """Does the same search on lists, by the log-probabilities of `sequences`; the worst comes first."""
    prefix = {}  # prefix -> its log-probability, that of all sequences that begin so
    for seq, log_prob in model.sequences(row).items():
        for size in range(1, LENGTH + 1):
            if EOS in seq[: size - 1]:
                break
            prefix[seq[:size]] = np.logaddexp(prefix.get(seq[:size], -np.inf), log_prob)
    live, finished = [()], []
    for step in range(LENGTH):
        candidates = [(*seq, token) for seq, token in itertools.product(live, range(VOCAB))]
        candidates = sorted(candidates, key=prefix.get, reverse=True)[: 2 * beams]
        last = step == LENGTH - 1
        finished += [seq for seq in candidates[:beams] if seq[-1] == EOS or last]
        finished = sorted(finished, key=prefix.get, reverse=True)[:beams]
        live = [seq for seq in candidates if seq[-1] != EOS][:beams]
        if len(finished) == beams and prefix[finished[-1]] > prefix[live[0]]:
            break
    return [(seq + (0,) * (LENGTH - len(seq)), prefix[seq]) for seq in reversed(finished)]


def test_a_beam_search_where_nothing_ends_gives_what_was_cut():
    step, _ = follow([2, 2, 3, 2, 2, 2])

    def never_ending(state):
        logits, cache = step(state)
        return logits.at[:, EOS].set(-1e9), cache

    tokens, scores = decoding.beam_search(
        jnp.zeros((1, 3), jnp.int32),
        {"steps": jnp.zeros((), int)},
        never_ending,
        num_decodes=2,
        alpha=1.0,
        penalty_fn=decoding.length_penalty,
    )
    np.testing.assert_array_equal(tokens[0, -1], [2, 3, 2])
    np.testing.assert_allclose(scores[0, -1], 5 - np.log(np.exp(5) + 4), rtol=1e-5)


@pytest.mark.parametrize(("alpha", "steps"), [(0.0, 2), (0.6, 3)])
def test_a_beam_search_stops_where_no_live_sequence_can_win(alpha, steps):
    # After every token comes EOS, with a log-probability near 0, or another, with -5. So after two steps EOS
    # and "x EOS" (-5) have ended and "x y" (-10) lives; with 20 tokens its score would be -10 / (25 / 6)^0.6.
    step, calls = follow([EOS] * 6)
    tokens, _ = jax.jit(
        lambda: decoding.beam_search(
            jnp.zeros((2, 20), jnp.int32),
            {"steps": jnp.zeros((), int)},
            step,
            num_decodes=2,
            alpha=alpha,
        )
    )()
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens[:, -1, :2], [[EOS, 0]] * 2)
    assert len(calls) == steps


def test_greedy_is_what_topk_1_or_no_temperature_give(model):
    tokens, log_probs = model.decode(decoding.temperature_sample)
    for row in range(len(tokens)):
        assert log_probs[row, 0] == pytest.approx(model.sequences(row)[tuple(tokens[row, 0])], rel=1e-5)
    cold, _ = model.decode(decoding.temperature_sample, temperature=0.0, topk=0)
    np.testing.assert_array_equal(cold, tokens)


def kept(probabilities, temperature, topk, topp):
    """Computes the distribution from which each token is drawn."""
    probabilities = probabilities ** (1 / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    if topk:
        order = order[:topk]
    if topp:
        order = order[: 1 + int((np.cumsum(probabilities[order]) < topp).sum())]
    result = np.zeros_like(probabilities)
    result[order] = probabilities[order] / probabilities[order].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "topk", "topp"), [(1.0, 0, 0.0), (0.5, 0, 0.0), (1.0, 3, 0.0), (2.0, 0, 0.7)]
)
def test_samples_are_distributed_as_asked(temperature, topk, topp):
    logits = np.array([0.0, 1.0, 2.0, 0.5, -1.0, 1.5], np.float32)
    draws, log_probs = jax.jit(
        lambda: decoding.temperature_sample(
            jnp.zeros((1, 1), jnp.int32),
            {"keys": jnp.zeros((1, 2))},
            lambda state: (
                jnp.tile(jnp.asarray(logits, jnp.float32), (len(state.cur_token), 1)),
                state.cache,
            ),
            num_decodes=20_000,
            temperature=temperature,
            topk=topk,
            topp=topp,
        )
    )()
    own = np.exp(logits) / np.exp(logits).sum()
    expected = kept(own.copy(), temperature, topk, topp)
    found = np.bincount(np.asarray(draws).ravel(), minlength=6) / 20_000
    # Five standard deviations of a frequency.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 20_000)).all()
    # By the model's own distribution, in ascending order.
    np.testing.assert_allclose(log_probs[0], np.sort(np.log(own)[np.asarray(draws)[0, :, 0]]), rtol=1e-5)


def test_several_samples_follow_their_own_pasts(model):
    tokens, log_probs = model.decode(
        decoding.temperature_sample, num_decodes=6, topk=0, decode_rng=jax.random.key(1)
    )
    assert tokens.shape == (3, 6, LENGTH)
    for row, sample in itertools.product(range(3), range(6)):
        expected = model.sequences(row)[tuple(tokens[row, sample])]
        assert log_probs[row, sample] == pytest.approx(expected, rel=1e-4)
    assert (np.diff(log_probs, axis=1) >= 0).all()
    assert len({tuple(seq) for seq in tokens[0]}) > 1
    other, _ = model.decode(decoding.temperature_sample, num_decodes=6, topk=0)
    assert (other != tokens).any(), "another seed, other draws"


@pytest.mark.parametrize(
    "kwargs", [{"topk": 2, "topp": 0.5}, {"topk": -1}, {"topk": 0, "topp": 1.5}, {"temperature": -1}]
)
def test_settings_that_make_no_sense(model, kwargs):
    with pytest.raises(ValueError, match="topk"):
        model.decode(decoding.temperature_sample, **kwargs)


def test_caches_of_scanned_layers_have_their_batch_second():
    cache = {"cached_key": jnp.arange(12).reshape(2, 3, 2), "cache_index": jnp.zeros(2, int)}
    wide = decoding.cache_expand(cache, 2, cache_offset=1)
    assert wide["cache_index"].shape == (2,)
    np.testing.assert_array_equal(wide["cached_key"][:, ::2], cache["cached_key"])
    np.testing.assert_array_equal(wide["cached_key"][:, 1::2], cache["cached_key"])


def optional_text(words, suffix, positions):
    """Makes the text for `constrained_decode` from words of pieces, each with an optional suffix."""
    pieces, skip_to = [], []
    for word in words:
        pieces += [*word, *suffix]
        skip_to += [0] * len(word) + [len(pieces)] + [0] * (len(suffix) - 1)
    pieces.append(EOS)
    text = np.zeros((2, positions), np.int32)
    text[0, : len(pieces)], text[1, : len(skip_to)] = pieces, skip_to
    return text


def test_constrained_decoding_by_hand():
    # "a_0 cat_0", as in the docstring: a 2, _0 3, cat 4.
    text = optional_text([[2], [4]], [3], positions=8)
    np.testing.assert_array_equal(text, [[2, 3, 4, 3, EOS, 0, 0, 0], [0, 2, 0, 4, 0, 0, 0, 0]])
    # Row: the token written last. The model would rather end at once, and begin again after "cat"; it can't.
    logits = np.zeros((6, 6), np.float32)
    logits[0, EOS] = 9
    logits[2, [3, 4]] = 1, 3
    logits[4, [2, 3, EOS]] = 8, 2, 1.5
    # After "_0" there is nothing to decide.
    logits[3, 5] = 7
    step = lambda state: (jnp.asarray(logits)[state.cur_token[:, 0]], state.cache)  # noqa: E731
    tokens, log_probs, log_odds, written = decoding.constrained_decode(
        jnp.zeros((1, 6), jnp.int32), {"steps": jnp.zeros((), int)}, step, text[None]
    )
    np.testing.assert_array_equal(tokens, [[2, 4, 3, EOS, 0, 0]])
    nothing = np.nan
    np.testing.assert_allclose(
        log_odds[0], [nothing, 1 - 3, nothing, 2 - 1.5, nothing, nothing, nothing, nothing]
    )
    assert np.flatnonzero(written[0]).tolist() == [3]
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    path = log_softmax[0, 2] + log_softmax[2, 4] + log_softmax[4, 3] + log_softmax[3, EOS]
    np.testing.assert_allclose(log_probs, [path], rtol=1e-5)


# Pieces 2 and 3 are words', 4 begins the suffix.
WORDS = [[2], [3], [3, 2], [2]]


class ConstrainedModel(PrefixModel):
    """The same language model, copying `WORDS`."""

    def __init__(self, rng, batch, suffix, words=WORDS):
        super().__init__(rng, batch)
        self.words, self.suffix = words, suffix
        self.text = optional_text(words, suffix, positions=20)
        ends = np.cumsum([len(word) + len(suffix) for word in words])
        self.decided_at = (ends - len(suffix)).tolist()

    def copy(self, length=16, **kwargs):
        inputs = jnp.zeros((len(self.table), length), jnp.int32)
        text = jnp.asarray(np.stack([self.text] * len(self.table)))
        results = jax.jit(
            lambda: decoding.constrained_decode(inputs, self.cache, self.tokens_to_logits, text, **kwargs)
        )()
        return tuple(np.asarray(x) for x in results)

    def forced(self, row, marks):
        """Returns the text with these words marked, its log-probability, and each word's log-odds."""
        tokens, decisions = [], []
        following = [*(word[0] for word in self.words[1:]), EOS]
        for word, mark, after in zip(self.words, marks, following, strict=True):
            tokens += word
            decisions.append((len(tokens), after))
            tokens += self.suffix if mark else []
        tokens.append(EOS)
        logits = self.teacher_forced(row, tokens)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        log_odds = [logits[i, self.suffix[0]] - logits[i, after] for i, after in decisions]
        return tokens, log_probs[np.arange(len(tokens)), tokens].sum(), log_odds

    def teacher_forced(self, row, tokens):
        """Computes the logits at each position: float64 [length, vocab]."""
        hashes = [1]
        for token in tokens[:-1]:
            hashes.append((hashes[-1] * VOCAB + token + 1) % 997)
        return self.table[row, hashes].astype(np.float64)


@pytest.mark.parametrize("suffix", [[4], [4, 2]])
@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_constrained_decoding_is_the_one_consistent_way_to_mark_the_words(rng, suffix, threshold):
    model = ConstrainedModel(rng, 8, suffix)
    tokens, log_probs, log_odds, written = model.copy(threshold=threshold)
    limit = np.log(threshold / (1 - threshold))
    chosen = set()
    for row in range(8):
        ways = {}
        for marks in itertools.product([False, True], repeat=len(WORDS)):
            text, log_prob, odds = model.forced(row, marks)
            if tuple(np.array(odds) > limit) == marks:
                ways[marks] = text, log_prob, odds
        # At the first word where two ways differ, they have the same past: one of them goes against the odds.
        ((marks, (text, log_prob, odds)),) = ways.items()
        np.testing.assert_array_equal(tokens[row], text + [0] * (16 - len(text)))
        np.testing.assert_allclose(log_odds[row, model.decided_at], odds, rtol=1e-5)
        np.testing.assert_array_equal(written[row, model.decided_at], marks)
        assert np.isfinite(log_odds[row]).sum() == len(WORDS)
        assert written[row].sum() == sum(marks)
        np.testing.assert_allclose(log_probs[row], log_prob, rtol=1e-5)
        chosen.add(marks)
    assert len(chosen) > 3


def test_what_constrained_decoding_has_no_room_for_is_not_decided(rng):
    model = ConstrainedModel(rng, 8, [4])
    whole, _, all_odds, _ = model.copy()
    # Positions behind those that can be reached may be left away.
    model.text = model.text[:, :9]
    tokens, log_probs, log_odds, written = model.copy(length=3)
    np.testing.assert_array_equal(tokens, whole[:, :3])
    np.testing.assert_array_equal(log_odds[:, 1], all_odds[:, 1])
    # Two words and one decision take at least three steps: the third word's is never reached.
    assert np.isnan(log_odds[:, 4:]).all()
    assert not written[:, 4:].any()
    # The second word's is reached where the first was not marked.
    np.testing.assert_array_equal(np.isnan(log_odds[:, 3]), written[:, 1])
    assert 0 < written[:, 1].sum() < 8
    assert np.isfinite(log_probs).all()


def test_constrained_decoding_of_other_rows_and_orders(rng):
    model = ConstrainedModel(rng, 6, [4])
    expected = model.copy()
    order = np.array([3, 0, 5, 1, 4, 2])
    model.table = model.table[order]
    for found, whole in zip(model.copy(), expected, strict=True):
        np.testing.assert_array_equal(found, whole[order])


def test_constrained_decoding_stops_with_the_last_text():
    # Marks all of the first text, which fills its positions, and nothing of the second.
    step, calls = follow([0, 0, EOS, 4, 0, 0])
    texts = np.stack(
        [optional_text(words, [4], positions=5) for words in ([[3], [3]], [[2]], [])]
        + [np.zeros((2, 5), int)]
    )
    tokens, log_probs, log_odds, _ = jax.jit(
        lambda: decoding.constrained_decode(
            jnp.zeros((4, 30), jnp.int32), {"steps": jnp.zeros((), jnp.int32)}, step, jnp.asarray(texts)
        )
    )()
    jax.effects_barrier()
    assert len(calls) == 5
    expected = [[3, 4, 3, 4, EOS], [2, EOS, 0, 0, 0], [EOS, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(tokens[:, :5], expected)
    assert not tokens[:, 5:].any()
    assert log_probs[3] == 0, "padding is no text"
    assert np.isnan(log_odds[2:]).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_that_make_no_sense(rng, threshold):
    with pytest.raises(ValueError, match="threshold"):
        ConstrainedModel(rng, 1, [4]).copy(threshold=threshold)
