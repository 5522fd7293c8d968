"""Report of a join: a summary to print, and everything in report.json."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from richhf_jax import feedback, foreign_text
from richhf_jax.datasets.rich_hf_18k.join import State
from richhf_jax.datasets.rich_hf_18k.labels import SPLITS, Index, write_json

# https://github.com/google-research/google-research/tree/master/richhf_18k
PUBLISHED_SIZES = {"train": 15_810, "dev": 995, "test": 955}
FILE = "report.json"
# Lines of a list that are printed; the file has all of them.
_SHOWN = 5


@dataclasses.dataclass
class Report:
    """Counts and lists of what is in the data set and what isn't. Each text is a record, row or shard.

    Attributes:
      splits: name of the labels' file -> number of records in it, with an image, and as published.
      missing: records left out because no image was found.
      undecodable: records left out because an image or heatmap is broken, with all that was tried.
      bad_records: records left out because they can't be read.
      source_problems: lines of prompts and files of images that can't be used, or are there twice.
      replaced: broken images for which another row had a good one.
      bad_shards: shards that could not be read to their end.
      duplicates: records left out because an earlier one has the same image.
      repeated_rows: number of rows left out because an earlier one has the same image.
      other_prompts: those of these rows whose prompt is another one.
      mismatches: records whose labels are unknown or don't match the prompt's tokens in number. They are
        kept, but their labels are never paired with words.
      missing_scores: field -> number of records without it. It is NaN in the data and has no weight in
        training.
      zero_overall: records with an overall score of exactly 0.
      zero_overall_treated_as: 'score' or 'missing'.
      problem: why nothing may be built, or None.
    """

    splits: dict[str, dict[str, int]]
    missing: list[str]
    undecodable: list[str]
    bad_records: list[str]
    source_problems: list[str]
    replaced: list[str]
    bad_shards: list[str]
    duplicates: list[str]
    repeated_rows: int
    other_prompts: list[str]
    mismatches: list[str]
    missing_scores: dict[str, int]
    zero_overall: list[str]
    zero_overall_treated_as: str
    problem: str | None = None

    @property
    def left_out(self) -> int:
        """Number of records that are bad, or without image or heatmap."""
        return sum(split["records"] - split["with_image"] for split in self.splits.values())

    def __str__(self) -> str:
        lines = []
        for name, size in self.splits.items():
            lines.append(
                f"{name}: {size['with_image']} of {size['records']} records have their image"
                f" (published: {size['published']})"
            )
        lists = {
            "missing images": self.missing,
            "undecodable images or heatmaps, left out": self.undecodable,
            "records that can't be read, left out": self.bad_records,
            "prompts and image files that can't be used, or are there twice": self.source_problems,
            "undecodable images, replaced by another row's": self.replaced,
            "shards that could not be read to their end": self.bad_shards,
            "records of an image that had one before, left out": self.duplicates,
            "rows with another prompt for an image (the first prompt was taken)": self.other_prompts,
            "records whose labels don't fit the prompt's tokens (kept, without keywords)": self.mismatches,
            f"overall scores of 0 (taken as: {self.zero_overall_treated_as})": self.zero_overall,
        }
        for name, content in lists.items():
            lines.append(f"{name}: {len(content)}")
            lines += [f"    {foreign_text.for_terminal(text)}" for text in content[:_SHOWN]]
            if len(content) > _SHOWN:
                lines.append("    ...")
        scores = ", ".join(f"{count} {field}" for field, count in sorted(self.missing_scores.items()))
        lines.append(f"missing scores: {scores or 0}")
        lines.append(f"rows with an image that had been found before: {self.repeated_rows}")
        return "\n".join(lines)

    def write(self, path: pathlib.Path) -> None:
        """Writes all of it as a JSON file."""
        write_json(path, dataclasses.asdict(self))


def make_report(index: Index, state: State, source_problems: Sequence[str]) -> Report:
    """Makes a report from the labels' index, the state of the join, and `Source.problems`."""
    broken: dict[str, list[str]] = {}
    notes = list(state.notes.values())
    for uid, reason in (item for note in notes for item in note.undecodable):
        broken.setdefault(uid, []).append(reason)
    splits = index.splits
    absent = [uid for uid in splits if uid not in state.prompts]
    left_out = [f"{index.filenames[uid]}: {'; '.join(broken[uid])}" for uid in absent if uid in broken]
    for heatmaps in index.broken_heatmaps.values():
        left_out += [f"{index.filenames[uid]}: {reason}" for uid, reason in heatmaps.items()]
    return Report(
        splits=_split_sizes(index, state.prompts),
        missing=[index.filenames[uid] for uid in absent if uid not in broken],
        undecodable=left_out,
        bad_records=[line for lines in index.bad_records.values() for line in lines],
        source_problems=list(source_problems),
        replaced=[
            reason
            for uid, reasons in broken.items()
            if uid in splits and uid in state.prompts
            for reason in reasons
        ],
        bad_shards=[note.bad for note in notes if note.bad],
        duplicates=index.duplicates,
        repeated_rows=sum(note.repeated for note in notes),
        other_prompts=[f"{uid}: {text}" for note in notes for uid, text in note.other_prompts],
        mismatches=_mismatches(index, state.prompts),
        missing_scores=index.missing_scores,
        zero_overall=index.zero_overall,
        zero_overall_treated_as="missing" if index.zero_is_missing else "score",
    )


def _split_sizes(index: Index, prompts: Mapping[str, str]) -> dict[str, dict[str, int]]:
    return {
        split: {
            "records": sum(
                len(part.get(split, ()))
                for part in (index.keywords, index.broken_heatmaps, index.bad_records)
            ),
            "with_image": sum(uid in prompts for uid in index.keywords[split]),
            "published": PUBLISHED_SIZES[split],
        }
        for split in SPLITS
    }


def _mismatches(index: Index, prompts: Mapping[str, str]) -> list[str]:
    """Lists records whose labels can't be paired with the prompt's tokens."""
    found = []
    for keywords in index.keywords.values():
        for uid, text in keywords.items():
            if uid not in prompts:
                continue
            try:
                feedback.label_tokens(prompts[uid], feedback.parse_labels(text))
            except ValueError as error:
                found.append(f"{index.filenames[uid]}: {error}")
    return found
