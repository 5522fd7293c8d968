"""Reads batches for training and evaluation, in an order that depends on seed and epoch alone.

A training example has a global position: 0, 1, 2, ... over all epochs and hosts. Its task, its record and
its random numbers are functions of the position. So a stream can start at any step at once, the saved
position is one number, and neither the number of hosts nor restarts change the examples:

    position -> (task, k)    by a schedule in blocks, in which each task has its share (`_schedule`)
    k -> epoch, record       by a permutation of the split for each epoch (`_examples`)

Evaluation takes each record once, in order. Everything else (preprocessing, mixing rates) is stock seqio.
`seqio.get_dataset` works on the same tasks, without these promises.
"""

import copy
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import gin
import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from richhf_jax import datasets, errors, feedback, foreign_text, preprocessors
from richhf_jax.datasets import records, tfrecord
from richhf_jax.feature_converters import RahfFeatureConverter

# Positions in a block of a mixture's schedule; rates are rounded to a multiple of 1 / _BLOCK.
_BLOCK = 1000
_FOREVER = np.iinfo(np.int64).max
# Purposes of permutations, so that no two use the same seed.
_RECORDS, _TASKS = range(2)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Choice of data to read (T5X's `DatasetConfig`).

    Attributes:
      mixture_or_task_name: a registered seqio task or mixture.
      task_feature_lengths: sizes and slot counts; see `preprocessors`.
      split: 'train', 'validation', 'test', or another split of the task.
      batch_size: examples in a batch, over all hosts.
      shuffle: whether each epoch has an order of its own (for training), or the records' order.
      seed: seed of the order and of every random choice in preprocessing.
      augment: whether images are augmented (`augmentation`).

    Raises:
      errors.UserError: the batch size is no number above 0.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    split: str
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    augment: bool = False

    def __post_init__(self):
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise errors.UserError(f"BATCH_SIZE must be a whole number above 0, got {self.batch_size!r}")


def task_or_mixture(name: str) -> seqio.Task | seqio.Mixture:
    """Returns a registered task or mixture.

    Raises:
      errors.UserError: there is none of this name.
    """
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
        alike = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
        raise errors.UserError(f"MIXTURE_OR_TASK_NAME: there is no task {name!r} in tasks/{hint}") from error


def get_dataset(
    cfg: DatasetConfig,
    shard_info: seqio.ShardInfo,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] = RahfFeatureConverter,
    start_step: int = 0,
) -> tf.data.Dataset:
    """Returns an endless stream of this host's part of each batch, as model features.

    Args:
      cfg: what to read.
      shard_info: this host's index and the number of hosts. Hosts have consecutive parts of a batch: joined
        in the hosts' order, they are the batch of a single host.
      feature_converter_cls: makes the converter to model features.
      start_step: number of batches to leave out; a later start takes no longer.

    Raises:
      errors.UserError: a task's data isn't built or lacks the split; the batch doesn't split evenly over the
        hosts; or a mixture's rates make no sense.
    """
    converter = feature_converter_cls()
    positions = _host_positions(cfg.batch_size, shard_info, start_step)
    dataset = _stream(cfg, positions, lambda _, examples: converter(examples, cfg.task_feature_lengths))
    dataset = dataset.batch(cfg.batch_size // shard_info.num_shards, drop_remainder=True)
    return _deterministic(dataset.prefetch(2))


def example_names(cfg: DatasetConfig, batch: int) -> list[str]:
    """Names the examples of a batch, over all hosts: '<task>: <file name>', one line each.

    Args:
      cfg: what is read.
      batch: the batch's number, from 0.

    Raises:
      errors.UserError: see `get_dataset`.
    """
    positions = tf.data.Dataset.range(batch * cfg.batch_size, (batch + 1) * cfg.batch_size)

    def names(task, examples):
        return examples.map(lambda example: task.name + ": " + example[feedback.FILENAME_FIELD])

    dataset = _deterministic(_stream(cfg, positions, names))
    return [foreign_text.for_terminal(name.decode()) for name in dataset.as_numpy_iterator()]


def data_shapes(
    cfg: DatasetConfig,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] = RahfFeatureConverter,
) -> dict[str, np.ndarray]:
    """Returns name -> shape and dtype of a batch, over all hosts, as zeros that take no memory.

    Args:
      cfg: what is read.
      feature_converter_cls: makes the converter, which has RahfFeatureConverter's `convert_example`.

    Raises:
      errors.UserError: see `get_dataset`.
    """
    task = _tasks(task_or_mixture(cfg.mixture_or_task_name))[0]
    examples = _examples(task, cfg, _Records(task, cfg.split), tf.data.Dataset.range(1))
    converter = cast(Any, feature_converter_cls())
    specs = examples.map(converter.convert_example).element_spec
    return {
        name: np.broadcast_to(np.zeros([], spec.dtype.as_numpy_dtype), [cfg.batch_size, *spec.shape])
        for name, spec in specs.items()
    }


def check_vocabulary(cfg: DatasetConfig, vocab_size: int | None, exact: bool = False) -> None:
    """Checks that the model knows every token id of the data: an unknown id would be read as another token.

    Args:
      cfg: what is read.
      vocab_size: number of tokens of the model; None: it reads no text.
      exact: whether the data's vocabulary must have as many, see `models.BaseModel.exact_vocabulary`.

    Raises:
      errors.UserError: the data's vocabulary is larger than the model's, or of another size.
    """
    features = task_or_mixture(cfg.mixture_or_task_name).output_features
    if vocab_size is None:
        return
    size = features["inputs"].vocabulary.vocab_size
    if size > vocab_size and not exact:
        raise errors.UserError(
            f"{cfg.mixture_or_task_name}: its vocabulary has {size} tokens, the model {vocab_size}; set"
            " VOCABULARY to the model's SentencePiece file, or T5Config.vocab_size"
        )
    if exact and size != vocab_size:
        raise errors.UserError(
            f"{cfg.mixture_or_task_name}: its vocabulary has {size} tokens, the model {vocab_size}; set"
            " VOCABULARY to the model's tokenizer.json"
        )


def fit() -> str:
    """Returns the way in which pictures become square, see `augmentation.show`."""
    try:
        # The copy of a macro is its value.
        return copy.deepcopy(gin.query_parameter("augmentation.show.fit"))
    except ValueError:  # Nothing is bound to it.
        return "resize"


def vocabulary_model(cfg: DatasetConfig) -> bytes | None:
    """Returns the SentencePiece model of the data's prompts; None for a vocabulary of another kind."""
    features = task_or_mixture(cfg.mixture_or_task_name).output_features
    return getattr(features["inputs"].vocabulary, "sp_model", None)


def data_identity(cfg: DatasetConfig) -> dict[str, Any]:
    """Tells the data of a task's split from others: {"data": name and version, "data_bytes", "examples"}.

    Raises:
      errors.UserError: as `evaluation_batches`.
    """
    task = seqio.TaskRegistry.get(cfg.mixture_or_task_name)
    count, info = len(_Records(task, cfg.split)), _builder(task).info
    return {"data": info.full_name, "data_bytes": int(info.dataset_size), "examples": count}


class TrainStream:
    """Batches of `get_dataset` as numpy arrays, for the training loop.

    Attributes:
      batch_shapes: see `data_shapes`.
    """

    def __init__(
        self,
        cfg: DatasetConfig,
        get_data_layout: Callable[[int], Any],
        feature_converter_cls: Callable[..., seqio.FeatureConverter] = RahfFeatureConverter,
    ):
        """Finds the shapes of the batches; reads no record yet.

        Args:
          cfg: what to read.
          get_data_layout: batch size -> an object with `shard_id` and `num_shards` (`partitioning`).
          feature_converter_cls: makes the converter; see `data_shapes`.
        """
        layout = get_data_layout(cfg.batch_size)
        self._cfg = cfg
        self._shard_info = seqio.ShardInfo(layout.shard_id, layout.num_shards)
        self._converter_cls = feature_converter_cls

    @functools.cached_property
    def batch_shapes(self) -> dict[str, np.ndarray]:
        """Name -> shape and type in a batch: see `data_shapes`."""
        return data_shapes(self._cfg, self._converter_cls)

    def position(self, step: int) -> dict[str, int]:
        """Returns the stream's position after `step` batches, for a checkpoint."""
        return {"step": step}

    def batches(self, position: Mapping[str, int]) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's batches from a position on; {} is the beginning.

        Raises:
          errors.UserError: see `get_dataset`; or, from the iterator, a file can't be read.
        """
        step = position.get("step", 0)
        return _numpy(self._cfg, get_dataset(self._cfg, self._shard_info, self._converter_cls, step))


def evaluation_batches(
    cfg: DatasetConfig,
    shard_info: seqio.ShardInfo,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] = RahfFeatureConverter,
    start_step: int = 0,
) -> Iterator[tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Yields each record of a task's split once, in order.

    Every host gets equally many batches, and each batch has its full size. Zeros, which have weight 0
    everywhere, fill it up behind the last record.

    Args:
      cfg: what to read. `shuffle` is ignored; `seed` matters only if kinds are drawn for the slots.
      shard_info: see `get_dataset`.
      feature_converter_cls: makes the converter; see `data_shapes`.
      start_step: number of batches to leave out; they are not read.

    Yields:
      The task examples of the batch's real records, maybe none, with the records' strings; and the model
      features of the whole batch.

    Raises:
      errors.UserError: the task's data isn't built, lacks the split or can't be read; the name is a
        mixture's; or the batch doesn't split evenly over the hosts.
    """
    task = task_or_mixture(cfg.mixture_or_task_name)
    if not isinstance(task, seqio.Task):
        raise errors.UserError(f"{task.name} is a mixture: evaluate its tasks one by one")
    size = cfg.batch_size // shard_info.num_shards
    data = _Records(task, cfg.split)
    positions = _host_positions(cfg.batch_size, shard_info, start_step)
    positions = positions.take_while(lambda position: position < len(data))
    examples = _examples(task, dataclasses.replace(cfg, shuffle=False), data, positions)
    convert = cast(Any, feature_converter_cls()).convert_example
    batches = _deterministic(
        examples.map(lambda example: (example, convert(example))).batch(size).prefetch(2)
    )
    nothing = tuple(
        {name: np.zeros([0, *spec.shape[1:]], spec.dtype.as_numpy_dtype) for name, spec in specs.items()}
        for specs in batches.element_spec
    )
    iterator = _numpy(cfg, batches)
    for _ in range(start_step, -(-len(data) // cfg.batch_size)):
        examples, features = next(iterator, nothing)
        real = len(next(iter(features.values())))
        rows = [{name: value[row] for name, value in examples.items()} for row in range(real)]
        yield rows, {name: _pad(value, size) for name, value in features.items()}


def _stream(
    cfg: DatasetConfig,
    positions: tf.data.Dataset,
    convert: Callable[[seqio.Task, tf.data.Dataset], tf.data.Dataset],
) -> tf.data.Dataset:
    """Returns the examples at these global positions, converted task by task."""
    provider = task_or_mixture(cfg.mixture_or_task_name)
    tasks = _tasks(provider)
    quotas = _quotas(provider, tasks)
    schedule = positions.map(functools.partial(_schedule, quotas=quotas, seed=cfg.seed))
    streams = []
    for number, task in enumerate(tasks):
        ks = positions  # A single task has all positions.
        if len(tasks) > 1:
            chosen_ones = schedule.filter(lambda chosen, _, number=number: chosen == number)
            ks = chosen_ones.map(lambda _, k: k)
        streams.append(convert(task, _examples(task, cfg, _Records(task, cfg.split), ks)))
    if len(tasks) == 1:
        return streams[0]
    return tf.data.Dataset.choose_from_datasets(streams, schedule.map(lambda chosen, _: chosen))


def _deterministic(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Fixes the order, and as many parallel calls of each map as there are cores.

    TensorFlow's tuner of parallel calls sleeps for as long as the iterator has lived, at most a minute, and
    may miss that it is closed: a training then ended up to a minute late.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.autotune.initial_parallelism = os.cpu_count() or 1
    return dataset.with_options(options)


def _numpy(cfg: DatasetConfig, dataset: tf.data.Dataset) -> Iterator[Any]:
    """Yields a dataset's elements; raises a UserError if the configured data can't be read."""
    try:
        yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
        reason = str(error).splitlines()[0]  # TensorFlow's own stack follows.
        if corrupted := re.search(r"corrupted record at (\d+)", reason):
            tasks = _tasks(task_or_mixture(cfg.mixture_or_task_name))
            position = int(corrupted[1])
            files = [path for task in tasks for path in _Records(task, cfg.split).garbled_at(position)]
            reason = f"{' and '.join(files) or 'a file'}: the record at byte {position} is garbled"
        raise errors.UserError(
            f"the data can't be read: {reason}\nBring the file back or build the data anew"
        ) from error


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Appends rows of zeros, up to `size` rows."""
    return np.concatenate([array, np.zeros([size - len(array), *array.shape[1:]], array.dtype)])


@preprocessors.plain_graph
def _host_positions(batch_size: int, shard_info: seqio.ShardInfo, start_step: int = 0) -> tf.data.Dataset:
    """Returns the endless global positions of the examples that a host reads, from batch `start_step` on.

    Two hosts, batches of 4: the first reads 0 1, 4 5, 8 9, ...; the second 2 3, 6 7, 10 11, ...
    """
    size, remainder = divmod(batch_size, shard_info.num_shards)
    if remainder:
        raise errors.UserError(
            f"a batch of {batch_size} doesn't split evenly over {shard_info.num_shards} hosts"
        )
    first = shard_info.index * size
    return tf.data.Dataset.range(start_step * size, _FOREVER).map(
        lambda n: n // size * batch_size + first + n % size
    )


def _permute(index: tf.Tensor, count: int, kind: int, seed: int, round_: tf.Tensor) -> tf.Tensor:
    """Returns the place of `index` in a permutation of `count`; each round has its own, without a table."""
    seeds = tf.stack([tf.constant(seed, tf.int64), 2 * round_ + kind])
    last = tf.constant(count - 1, tf.int64)
    return tf.random.experimental.index_shuffle(index, seeds, last)


def _tasks(provider: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
    """Returns a task, or the tasks of a mixture without those of rate 0.

    Raises:
      errors.UserError: all rates are 0, or one is no number of 0 or more.
    """
    if isinstance(provider, seqio.Task):
        return [provider]
    rates = {task: provider.get_rate(task) for task in provider.tasks}
    for task, rate in rates.items():
        if not 0 <= rate < np.inf:
            raise errors.UserError(f"{provider.name}: the rate of {task.name} must be 0 or more, got {rate}")
    if not any(rates.values()):
        raise errors.UserError(f"{provider.name}: the rates of all its tasks are 0: set one above")
    return [task for task, rate in rates.items() if rate]


def _quotas(mixture_or_task: seqio.Task | seqio.Mixture, tasks: list[seqio.Task]) -> np.ndarray:
    """Returns the number of positions of a block that each task has, by the mixture's rates.

    Rates 2 and 1 -> [667, 333]: what rounding down leaves goes to the largest remainders. A task alone is its
    own block.
    """
    if len(tasks) == 1:
        return np.array([1])
    rates = np.array([cast(seqio.Mixture, mixture_or_task).get_rate(task) for task in tasks])
    shares = rates / rates.sum() * _BLOCK
    quotas = np.floor(shares).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: _BLOCK - quotas.sum()]] += 1
    if not quotas.all():
        raise errors.UserError(
            f"{mixture_or_task.name}: the rate of {tasks[quotas.argmin()].name} is below 1 in {_BLOCK}: raise"
            " it, or set 0 to leave the task out"
        )
    return quotas


@preprocessors.plain_graph
def _schedule(position: tf.Tensor, quotas: np.ndarray, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Maps a global position to the task's number, and to the number of one of this task's examples.

    In each block of positions a task has its exact share of examples, in an order drawn for the block; over
    all blocks, it has each of its examples once.
    """
    size = quotas.sum()
    ends = np.cumsum(quotas)
    block = position // size
    slot = _permute(position % size, size, _TASKS, seed, block)
    task = tf.searchsorted(ends, slot[None], side="right", out_type=tf.int64)[0]
    return task, block * tf.gather(quotas, task) + slot - tf.gather(ends - quotas, task)


def _builder(task: seqio.Task) -> tfds.core.DatasetBuilder:
    """Returns the TFDS builder of a task's data set, which must have been built."""
    loader = cast(seqio.TfdsDataSource, task.source).tfds_dataset
    try:
        builder = loader.builder
    except tfds.core.DatasetNotFoundError:  # No code makes the data set, and its files aren't there.
        builder = None
    if builder is None or not builder.is_prepared():
        # The name is NAME/CONFIG:VERSION, or NAME:VERSION for a data set without configurations.
        name, _, config = cast(str, loader.name).partition(":")[0].partition("/")
        command = datasets.BUILD_COMMANDS[name]
        where = builder.data_path if builder else loader.data_dir or "~/tensorflow_datasets"
        raise errors.UserError(
            f"{task.name}: its data, {loader.name}, isn't in {where}; build it by\n"
            f"    {command}{f' --config={config}' if config not in ('', 'default') else ''}\n"
            "and give --tfds_data_dir=DIR"
        )
    return builder


class _Records:
    """The records of a task's split, in the order of the TFDS files, readable in any order."""

    def __init__(self, task: seqio.Task, split: str):
        if split not in task.splits:
            raise errors.UserError(f"{task.name} has no split {split!r}, only {', '.join(task.splits)}")
        loader = cast(seqio.TfdsDataSource, task.source).tfds_dataset
        builder = _builder(task)
        try:
            files = loader.files(split)
        except ValueError as error:  # TFDS's message has many lines.
            raise errors.UserError(
                f"{task.name}: {builder.data_path} was built without a split {split!r}, it has"
                f" {', '.join(builder.info.splits)}"
            ) from error
        self._paths = [file.filename for file in files]
        try:
            self._files, self._offsets = records.locate([(f.filename, f.skip, f.take) for f in files])
        except (OSError, ValueError) as error:
            raise errors.UserError(
                f"{task.name}: its data can't be read: {error}\nBring the file back or build the data anew"
            ) from error
        self._features = cast(tfds.features.FeaturesDict, builder.info.features)
        # What no slot uses is never decoded; the preprocessors decode the rest.
        self._decoders = {
            name: tfds.decode.SkipDecoding()
            for name, feature in self._features.items()
            if isinstance(feature, tfds.features.Image)
        }

    def __len__(self) -> int:
        return len(self._offsets)

    def garbled_at(self, position: int) -> list[str]:
        """Lists the files whose record around this byte is garbled."""
        garbled = []
        for number, path in enumerate(self._paths):
            starts = self._offsets[(self._files == number) & (self._offsets <= position)]
            if starts.size:
                with epath.Path(path).open("rb") as file:
                    file.seek(starts[-1])
                    if isinstance(next(tfrecord.read(file)), tfrecord.RecordError):
                        garbled.append(path)
        return garbled

    def read(self, index: tf.Tensor) -> dict[str, tf.Tensor]:
        """Reads a record's features, images still encoded. Fails if the data doesn't match its checksum."""
        one_string = {"output_types": [tf.string], "output_shapes": [[]]}
        # This is tf.data.TFRecordDataset with an argument that its Python class lacks, `byte_offsets`. A
        # Python function could read as well, but its threads may hang the interpreter at exit.
        dataset = tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.gather(self._paths, tf.gather(self._files, index))[None],
            byte_offsets=tf.gather(self._offsets, index)[None],
            compression_type="",
            buffer_size=tf.constant(0, tf.int64),  # One record needs no reading ahead.
        )
        dataset = tf.raw_ops.TakeDataset(input_dataset=dataset, count=tf.constant(1, tf.int64), **one_string)
        record = tf.raw_ops.DatasetToSingleElement(dataset=dataset, **one_string)[0]
        example = self._features.deserialize_example(record, decoders=self._decoders)
        return example


def _examples(task: seqio.Task, cfg: DatasetConfig, data: _Records, ks: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the task's preprocessed example number k, for each k of a stream."""
    count = len(data)

    @preprocessors.plain_graph
    def read(k):
        shuffled = _permute(k % count, count, _RECORDS, cfg.seed, k // count) if cfg.shuffle else k % count
        added = {preprocessors.SEED: tf.stack([tf.constant(cfg.seed, tf.int64), k])}
        if cfg.augment:
            added[preprocessors.AUGMENT] = tf.constant(True)
        return data.read(shuffled) | added

    examples = ks.map(read, num_parallel_calls=tf.data.AUTOTUNE)
    source = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: examples, splits=[cfg.split])
    return task.replace(source=source).get_dataset(cfg.task_feature_lengths, cfg.split, shuffle=False)
