"""A checkpoint's predictions for the examples of a task: what evaluation and inference share."""

import collections
import dataclasses
import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tqdm

from richhf_jax import (
    checkpoints,
    feedback,
    input_pipeline,
    keywords,
    models,
    partitioning,
    postprocessors,
)
from richhf_jax import trainer as trainer_lib

# A task example, and what the model says of it.
Pair = tuple[Mapping[str, Any], feedback.RichFeedback]


def load(
    model: models.BaseModel,
    checkpoint_path: str,
    cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
) -> tuple[trainer_lib.Trainer, trainer_lib.AnyState, int]:
    """Makes a trainer for its predict step, and reads the checkpoint onto the mesh.

    Returns:
      The trainer, what it predicts with, and the checkpoint's step.

    Raises:
      errors.UserError: there is no checkpoint, or it doesn't fit the model; the data isn't built or lacks the
        split.
    """
    if jax.process_count() > 1:
        # jax takes it then, for training to save at.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    directory, step = checkpoints.find_checkpoint(checkpoint_path)
    if model.vocab_size is not None:
        input_pipeline.check_vocabulary(cfg, model.vocab_size)
    partitioner.get_data_layout(cfg.batch_size)
    trainer = trainer_lib.Trainer(model, partitioner, input_pipeline.data_shapes(cfg))
    return trainer, checkpoints.restore_inference_state(directory, trainer.abstract_state), step


def whole_split(
    trainer: trainer_lib.Trainer,
    state: trainer_lib.AnyState,
    cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
    constrained_keywords: bool,
) -> Iterator[list[Pair]]:
    """All examples of a split with their predictions, in the data's order, in process 0; in others none.

    Args:
      trainer, state: of `load`.
      cfg: what to read.
      partitioner: the mesh.
      constrained_keywords: as for `eval.evaluate`.

    Yields:
      Those of a batch.

    Raises:
      errors.UserError: as `input_pipeline.evaluation_batches`; the vocabulary can't mark keywords.
    """
    decoder = _Decoder(cfg, constrained_keywords)
    own = partitioner.own_rows(cfg.batch_size)

    def dispatched():
        # Every process reads all, so that process 0 has what the predictions are of.
        for examples, batch in _progress(input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1))):
            pieces, batch = decoder.prepare(examples, batch)
            yield (
                examples,
                pieces,
                trainer.predict(state, {name: value[own] for name, value in batch.items()}),
            )

    for examples, pieces, outputs in _one_ahead(dispatched()):
        outputs = jax.device_get(outputs)
        yield decoder.finish(examples, pieces, outputs) if jax.process_index() == 0 else []


def own_part(
    trainer: trainer_lib.Trainer,
    state: trainer_lib.AnyState,
    cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
    constrained_keywords: bool,
    shard_id: int = 0,
    num_shards: int = 1,
    start_step: int = 0,
) -> Iterator[list[Pair]]:
    """This process's part of a split's examples with their predictions; it reads no others.

    Args: as for `whole_split`, and
      shard_id, num_shards: where several jobs, each maybe of several processes, share the split: which of
        them this is, and how many there are.
      start_step: batches to leave out.

    Yields:
      Those of a batch, maybe none. All jobs and processes yield as often.

    Raises:
      errors.UserError: as `whole_split`.
    """
    decoder = _Decoder(cfg, constrained_keywords)
    layout = partitioner.get_data_layout(cfg.batch_size)
    # The jobs' batches, one behind the other, are one batch that the processes of all of them share.
    joined = dataclasses.replace(cfg, batch_size=cfg.batch_size * num_shards)
    index, count = shard_id * layout.num_shards + layout.shard_id, num_shards * layout.num_shards
    shard_info = seqio.ShardInfo(index, count)
    batches = input_pipeline.evaluation_batches(joined, shard_info, start_step=start_step)
    own = partitioner.own_rows(cfg.batch_size)

    def dispatched():
        for examples, batch in _progress(batches, start_step):
            pieces, batch = decoder.prepare(examples, batch)
            yield examples, pieces, trainer.predict(state, batch)

    for examples, pieces, outputs in _one_ahead(dispatched()):
        mine = {name: value[own] for name, value in jax.device_get(outputs).items()}
        yield decoder.finish(examples, pieces, mine)


def _progress(batches: Iterator[Any], done: int = 0) -> Iterator[Any]:
    """The same, with a bar in process 0."""
    silent = jax.process_index() > 0
    yield from tqdm.tqdm(
        batches, desc="predicting", unit=" batches", mininterval=1, disable=silent, initial=done
    )


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same, each behind the making of the next: device and host work on two of them at a time."""
    made = collections.deque(itertools.islice(items, 1))
    for item in items:
        made.append(item)
        yield made.popleft()
    yield from made


class _Decoder:
    """Task examples -> what else the model reads; its outputs -> feedback."""

    def __init__(self, cfg: input_pipeline.DatasetConfig, constrained_keywords: bool):
        features = seqio.get_mixture_or_task(cfg.mixture_or_task_name).output_features
        self._vocabulary = features["targets"].vocabulary
        self._suffix = keywords.suffix_pieces(self._vocabulary.encode) if constrained_keywords else None

    def prepare(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, np.ndarray]
    ) -> tuple[list[keywords.KeywordPieces], dict[str, np.ndarray]]:
        """The examples' words (none for free decoding), and the batch with these."""
        if self._suffix is None:
            return [], dict(batch)
        rows, _, length = batch["decoder_input_tokens"].shape
        prompts = [example[feedback.PROMPT_FIELD].decode() for example in examples]
        pieces = [keywords.keyword_pieces(prompt, self._vocabulary.encode, length) for prompt in prompts]
        return pieces, batch | keywords.features(pieces, rows, length, self._suffix)

    def finish(
        self,
        examples: Sequence[Mapping[str, Any]],
        pieces: Sequence[keywords.KeywordPieces],
        outputs: Mapping[str, np.ndarray],
    ) -> list[Pair]:
        """Each example with its prediction; row i of the outputs is example i's."""
        pairs = []
        for i, example in enumerate(examples):
            prompt = example[feedback.PROMPT_FIELD].decode()
            if pieces:
                decisions = (outputs[name][i, 0] for name in ("keyword_probability", "keyword_misaligned"))
                tokens = keywords.tokens(prompt, pieces[i].numbers, *decisions)
            else:
                text = self._vocabulary.decode(outputs["tokens"][i, 0].tolist())
                tokens = postprocessors.written_tokens(prompt, text)
            answer = postprocessors.prediction(example, outputs["heatmaps"][i], outputs["scores"][i], tokens)
            pairs.append((example, answer))
        return pairs
