"""Greedy decoding and beam search of our network against `generate` of transformers, on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax import traverse_util

from richhf_jax import decoding
from richhf_jax.convert import huggingface
from richhf_jax.network import layers, t5

# So few pieces that about every tenth is EOS: some sequences end early, others are cut.
VOCAB, INPUT_LENGTH, LENGTH, BATCH, MODELS = 10, 7, 9, 6, 10
SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
# Published T5 1.1 has a matrix of its own for the logits, T5 1.0 the token table.
CONFIGS = {
    "t5_1_1": ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("gelu", "linear")),
    "t5_1_0": ({"feed_forward_proj": "relu"}, ("relu",)),
}


class EncoderDecoder(nn.Module):
    """Our encoder and decoder around one token table, for text only."""

    config: t5.T5Config

    def setup(self):
        sizes = self.config
        self.token_embedder = layers.Embed(sizes.vocab_size, sizes.emb_dim, attend_dtype=jnp.float32)
        self.encoder = t5.Encoder(config=sizes)
        self.decoder = t5.Decoder(config=sizes, shared_embedding=self.token_embedder)

    def encode(self, tokens):
        mask = layers.make_attention_mask(tokens > 0, tokens > 0)
        return self.encoder(self.token_embedder(tokens), mask, deterministic=True)

    def decode(self, encoded, inputs, tokens):
        mask = layers.make_attention_mask(jnp.ones_like(tokens), inputs > 0)
        return self.decoder(
            encoded,
            tokens,
            encoder_decoder_mask=mask,
            deterministic=True,
            decode=True,
            max_decode_length=LENGTH,
        )


def our_config(name):
    return t5.T5Config(
        vocab_size=VOCAB,
        emb_dim=SIZES["d_model"],
        num_heads=SIZES["num_heads"],
        num_encoder_layers=SIZES["num_layers"],
        num_decoder_layers=SIZES["num_layers"],
        head_dim=SIZES["d_kv"],
        mlp_dim=SIZES["d_ff"],
        mlp_activations=CONFIGS[name][1],
        logits_via_embedding=name == "t5_1_0",
    )


def their_model(name, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        **SIZES,
        **CONFIGS[name][0],
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    if name == "t5_1_1":
        # transformers ties the two in a fresh model, whatever its configuration says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, SIZES["d_model"]))
    with torch.no_grad():
        for parameter in model.parameters():
            # Large: what comes next shall depend on all that was written, not on the last token alone.
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1)
        model.shared.weight.normal_(0, 0.3)
        # EOS is often either probable or improbable.
        model.lm_head.weight[1] *= 3
    return model


def our_params(model, directory):
    """Converts the weights to our tree."""
    model.save_pretrained(directory)
    tensors = huggingface.open_huggingface(str(directory)).tensors
    return traverse_util.unflatten_dict({name: value.read() for name, value in tensors.items()}, sep="/")


@functools.cache
def our_generate(name, beams):
    """(parameters, inputs, alpha) -> tokens and scores; greedy where there is one beam."""
    network = EncoderDecoder(our_config(name))

    @jax.jit
    def generate(params, inputs, alpha):
        encoded = network.apply({"params": params}, inputs, method="encode")
        targets = jnp.zeros((BATCH, LENGTH), jnp.int32)
        step = functools.partial(network.apply, method="decode", mutable=["cache"])
        _, variables = step({"params": params}, encoded, inputs, targets)
        wide = [jnp.repeat(x, beams, axis=0) for x in (encoded, inputs)]

        def tokens_to_logits(state):
            logits, updated = step({"params": params, "cache": state.cache}, *wide, state.cur_token)
            return logits[:, 0], updated["cache"]

        args = (targets, variables["cache"], tokens_to_logits)
        if beams == 1:
            return decoding.temperature_sample(*args)
        return decoding.beam_search(*args, num_decodes=beams, alpha=alpha, penalty_fn=decoding.length_penalty)

    return generate


def random_inputs(seed):
    """Makes inputs of different lengths, padded with 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, (BATCH, INPUT_LENGTH))
    return np.where(np.arange(INPUT_LENGTH) < rng.integers(2, INPUT_LENGTH + 1, (BATCH, 1)), tokens, 0)


def both(directory, name, seed, beams, alpha=0.0):
    """Returns our (tokens, scores), the best first, and the tokens and the whole output of `generate`."""
    model, inputs = their_model(name, seed), random_inputs(seed)
    tokens, scores = our_generate(name, beams)(our_params(model, directory), inputs, alpha)
    with torch.no_grad():
        found = model.generate(
            torch.tensor(inputs),
            attention_mask=torch.tensor(inputs > 0),
            max_new_tokens=LENGTH,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=alpha,
            early_stopping="never",
        )
    # Theirs begin with the start token, are as long as the longest, and may be filled up with EOS.
    theirs = np.zeros((BATCH * beams, LENGTH), np.int64)
    theirs[:, : found.sequences.shape[1] - 1] = found.sequences[:, 1:].numpy()
    theirs *= ~ended_before(theirs)
    ours = np.asarray(tokens)[:, ::-1].reshape(-1, LENGTH), np.asarray(scores)[:, ::-1].ravel()
    return ours, (theirs, found)


def ended_before(tokens):
    """Returns whether a sequence has ended before each of its positions."""
    return np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy(tmp_path, name):
    lengths = set()
    for seed in range(MODELS):
        (ours, log_probs), (theirs, found) = both(tmp_path, name, seed, beams=1)
        np.testing.assert_array_equal(ours, theirs)
        steps = [torch.log_softmax(logits, dim=-1).numpy() for logits in found.scores]
        chosen = [step[np.arange(BATCH), theirs[:, i]] for i, step in enumerate(steps)]
        expected = np.where(ended_before(theirs)[:, : len(steps)].T, 0, chosen).sum(axis=0)
        np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-5)
        lengths |= set((~ended_before(ours)).sum(axis=1).tolist())
    assert {1, 2, LENGTH} < lengths


@pytest.mark.parametrize(("name", "beams"), [("t5_1_1", 2), ("t5_1_1", 4), ("t5_1_1", 5), ("t5_1_0", 4)])
def test_beam_search(tmp_path, name, beams):
    lengths = set()
    for seed in range(MODELS):
        # Every second search ranks by the probability alone, the others prefer long sequences.
        alpha = float(seed % 2)
        (ours, scores), (theirs, found) = both(tmp_path, name, seed, beams, alpha)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(scores, found.sequences_scores.numpy(), rtol=1e-4, atol=1e-5)
        lengths |= set((~ended_before(ours)).sum(axis=1).tolist())
    assert lengths == set(range(1, LENGTH + 1))
