"""Predictions of a checkpoint for the examples of a task, for evaluation and inference."""

import collections
import dataclasses
import itertools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import seqio
import tqdm
from absl import logging

from richhf_jax import (
    checkpoints,
    errors,
    feedback,
    input_pipeline,
    keywords,
    model_description,
    models,
    partitioning,
    postprocessors,
)
from richhf_jax import trainer as trainer_lib

# A task example, and the model's prediction for it, or the error if the model's outputs aren't finite.
Pair = tuple[Mapping[str, Any], feedback.RichFeedback | errors.NotFiniteError]


def load(
    model: models.BaseModel,
    checkpoint_path: str,
    cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
) -> tuple[trainer_lib.Trainer, trainer_lib.AnyState, int]:
    """Makes a trainer for its predict step, and reads the checkpoint onto the mesh.

    Args:
      model: the model as it was trained.
      checkpoint_path: a `checkpoint_<step>` directory, or a MODEL_DIR, whose newest checkpoint is taken.
      cfg: the data to predict.
      partitioner: splits states and batches over the mesh.

    Returns:
      (the trainer, the state to predict with, the checkpoint's step).

    Raises:
      errors.UserError: there is no checkpoint, or it doesn't fit the model; the data isn't built, lacks the
        split or has another vocabulary.
    """
    if jax.process_count() > 1:
        # With several processes jax handles SIGTERM, for training to save a checkpoint. Here it shall end us.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    directory, step = checkpoints.find_checkpoint(checkpoint_path)
    input_pipeline.check_vocabulary(cfg, model.vocab_size, model.exact_vocabulary)
    model_description.check_vocabulary(
        os.path.dirname(directory), input_pipeline.vocabulary_model(cfg), "Set VOCABULARY to that file"
    )
    partitioner.get_data_layout(cfg.batch_size)
    trainer = trainer_lib.Trainer(model, partitioner, input_pipeline.data_shapes(cfg))
    flags = model_description.training_flags(os.path.dirname(directory))
    return trainer, checkpoints.restore_inference_state(directory, trainer.abstract_state, flags=flags), step


def deviation_factors(
    checkpoint_path: str, measured: input_pipeline.DatasetConfig | None = None
) -> Mapping[str, float]:
    """Reads the factors that calibrate the uncertainties of a checkpoint; warns if there are none.

    Args:
      checkpoint_path: as for `load`.
      measured: data on which the uncertainties are measured; warns if the factors were found on them.

    Returns:
      Kind of score -> factor; {} if the checkpoint isn't calibrated.

    Raises:
      errors.UserError: the description of its model is missing, damaged or changed.
    """
    directory, step = checkpoints.find_checkpoint(checkpoint_path)
    description = model_description.read(os.path.dirname(directory)).of_step(step)
    if description.calibration is None:
        logging.warning("%s: %s", directory, model_description.NOT_CALIBRATED)
        return {}
    found = description.calibration.task, description.calibration.split
    if measured and found == (measured.mixture_or_task_name, measured.split):
        logging.warning(
            "the uncertainties were calibrated on this split, so their coverage is no test of them"
        )
    return description.deviation_factors


def whole_split(
    trainer: trainer_lib.Trainer,
    state: trainer_lib.AnyState,
    cfg: input_pipeline.DatasetConfig,
    partitioner: partitioning.PjitPartitioner,
    constrained_keywords: bool,
) -> Iterator[list[Pair]]:
    """Predicts all examples of a split, in the data's order.

    Args:
      trainer, state: results of `load`.
      cfg: the data to predict.
      partitioner: splits states and batches over the mesh.
      constrained_keywords: as for `eval.evaluate`.

    Yields:
      The examples of a batch with their predictions; [] in any process but 0.

    Raises:
      errors.UserError: as `input_pipeline.evaluation_batches`; the vocabulary can't mark keywords.
    """
    answers = _Answers(trainer.model.outputs, cfg, constrained_keywords)
    own = partitioner.own_rows(cfg.batch_size)

    def dispatched():
        # Every process reads all examples, because process 0 needs them beside the predictions.
        for examples, batch in _progress(input_pipeline.evaluation_batches(cfg, seqio.ShardInfo(0, 1))):
            pieces, batch = answers.prepare(examples, batch)
            yield (
                examples,
                pieces,
                trainer.predict(state, {name: value[own] for name, value in batch.items()}),
            )

    for examples, pieces, outputs in _one_ahead(dispatched()):
        outputs = jax.device_get(outputs)
        yield answers.finish(examples, pieces, outputs) if jax.process_index() == 0 else []


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
    """Predicts this process's part of a split's examples, and reads no others.

    Args:
      trainer, state, cfg, partitioner, constrained_keywords: as for `whole_split`.
      shard_id, num_shards: index of this job from 0, and number of jobs that share the split. Each job may
        have several processes.
      start_step: number of batches to skip.

    Yields:
      This process's examples of a batch with their predictions, maybe none. All jobs and processes yield
      the same number of times.

    Raises:
      errors.UserError: as `whole_split`.
    """
    answers = _Answers(trainer.model.outputs, cfg, constrained_keywords)
    layout = partitioner.get_data_layout(cfg.batch_size)
    # The batches of all jobs together are one batch, which the processes of all jobs share.
    joined = dataclasses.replace(cfg, batch_size=cfg.batch_size * num_shards)
    index, count = shard_id * layout.num_shards + layout.shard_id, num_shards * layout.num_shards
    shard_info = seqio.ShardInfo(index, count)
    batches = input_pipeline.evaluation_batches(joined, shard_info, start_step=start_step)
    own = partitioner.own_rows(cfg.batch_size)

    def dispatched():
        for examples, batch in _progress(batches, start_step):
            pieces, batch = answers.prepare(examples, batch)
            yield examples, pieces, trainer.predict(state, batch)

    for examples, pieces, outputs in _one_ahead(dispatched()):
        mine = {name: value[own] for name, value in jax.device_get(outputs).items()}
        yield answers.finish(examples, pieces, mine)


def _progress(batches: Iterator[Any], done: int = 0) -> Iterator[Any]:
    """Yields the batches, and shows a progress bar in process 0."""
    silent = jax.process_index() > 0
    yield from tqdm.tqdm(
        batches, desc="predicting", unit=" batches", mininterval=1, disable=silent, initial=done
    )


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yields each item after making the next one, so that device and host work on two at a time."""
    made = collections.deque(itertools.islice(items, 1))
    for item in items:
        made.append(item)
        yield made.popleft()
    yield from made


class _Answers:
    """Makes the decoder's features from task examples, and feedback from the model's outputs."""

    def __init__(
        self, outputs: feedback.Outputs, cfg: input_pipeline.DatasetConfig, constrained_keywords: bool
    ):
        self._outputs = outputs
        self._words = _Words(cfg, constrained_keywords) if outputs.keywords else None

    def prepare(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, np.ndarray]
    ) -> tuple[list[keywords.KeywordPieces], dict[str, np.ndarray]]:
        """Returns the pieces of the examples' words ([] without a constraint), and the batch with them."""
        return self._words.prepare(examples, batch) if self._words else ([], dict(batch))

    def finish(
        self,
        examples: Sequence[Mapping[str, Any]],
        pieces: Sequence[keywords.KeywordPieces],
        outputs: Mapping[str, np.ndarray],
    ) -> list[Pair]:
        """Returns each example with its prediction, from row i of the outputs for example i."""
        pairs: list[Pair] = []
        for i, example in enumerate(examples):
            row = {name: value[i] for name, value in outputs.items()}
            try:
                prompt = example[feedback.PROMPT_FIELD].decode()
                answer = postprocessors.prediction(
                    example,
                    row["heatmaps"] if self._outputs.heatmaps else (),
                    row["scores"] if self._outputs.scores else (),
                    self._words.tokens(prompt, pieces[i : i + 1], row) if self._words else None,
                    row.get("score_deviations"),
                    self._outputs,
                )
            except errors.NotFiniteError as error:
                answer = error
            pairs.append((example, answer))
        return pairs


class _Words:
    """Makes the decoder's features from prompts, and labelled words from its outputs."""

    def __init__(self, cfg: input_pipeline.DatasetConfig, constrained_keywords: bool):
        features = seqio.get_mixture_or_task(cfg.mixture_or_task_name).output_features
        self._vocabulary = features["targets"].vocabulary
        self._suffix = keywords.suffix_pieces(self._vocabulary.encode) if constrained_keywords else None

    def prepare(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, np.ndarray]
    ) -> tuple[list[keywords.KeywordPieces], dict[str, np.ndarray]]:
        """Returns the pieces of the examples' words ([] for free decoding), and the batch with them."""
        if self._suffix is None:
            return [], dict(batch)
        rows, _, length = batch["decoder_input_tokens"].shape
        prompts = [example[feedback.PROMPT_FIELD].decode() for example in examples]
        pieces = [keywords.keyword_pieces(prompt, self._vocabulary.encode, length) for prompt in prompts]
        return pieces, dict(batch) | keywords.features(pieces, rows, length, self._suffix)

    def tokens(
        self, prompt: str, pieces: Sequence[keywords.KeywordPieces], row: Mapping[str, np.ndarray]
    ) -> Sequence[feedback.Token]:
        """Labels the prompt's tokens as an example's outputs say; `pieces` is [] for free decoding."""
        if not pieces:
            text = self._vocabulary.decode(row["tokens"][0].tolist())
            return postprocessors.written_tokens(prompt, text)
        return keywords.tokens(prompt, pieces[0], row["keyword_probability"][0], row["keyword_misaligned"][0])
