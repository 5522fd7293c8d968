"""Writes order.csv: the scored images, those that the model is unsure of first, for people to rate.

    image,prompt,uncertainty
    b.png,a yellow cat,1.3052
    a.png,"a red dog, asleep",0.7411

`image` is the id. `uncertainty` is relative: the standard deviation of each score, divided by this kind's
mean over all images of the run, then averaged over the kinds. So 1 is as unsure as usual. Images of equal
uncertainty are ordered by their ids.
"""

import csv
import itertools
import json
import pathlib

import numpy as np

from richhf_jax import writing

FILE = "order.csv"
_HEADER = ("image", "prompt", "uncertainty")


def write(path: pathlib.Path, predictions: pathlib.Path, count: int) -> None:
    """Writes the file, unless the predictions have no uncertainty. Only ids and numbers are kept in memory.

    Args:
      path: the file to write.
      predictions: a predictions.jsonl.
      count: number of its lines.
    """
    ids, deviations, offsets, offset = [], [], [], 0
    with predictions.open("rb") as file:
        for line in itertools.islice(file, count):
            record = json.loads(line)
            if "uncertainty" not in record:
                return
            ids.append(record["id"])
            deviations.append(list(record["uncertainty"].values()))
            offsets.append(offset)
            offset += len(line)
        if not ids:
            return
        uncertainties = [f"{value:.4f}" for value in _relative(np.array(deviations))]
        with writing.atomic(path) as new, new.open("w", encoding="utf-8") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(_HEADER)
            for i in sorted(range(len(ids)), key=lambda i: (-float(uncertainties[i]), ids[i])):
                file.seek(offsets[i])
                writer.writerow((ids[i], json.loads(file.readline())["prompt"], uncertainties[i]))


def _relative(deviations: np.ndarray) -> np.ndarray:
    """Divides [images, kinds] by the mean of each kind, and averages over the kinds: [images]."""
    return (deviations / deviations.mean(axis=0, keepdims=True)).mean(axis=1)
