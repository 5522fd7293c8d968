"""Puts a survey's result into the tables of `pages.table_formats`."""

from collections.abc import Mapping, Sequence

from richhf_jax.pages.table_formats import Column, Row, Table
from richhf_jax.survey.answers import CHECKS

_SIGNS = ("≫", ">", "≈", "<", "≪")

TABLES = (
    Table(
        "Table 5. Preference",
        "Share of answers: the first generator's image is much better (≫), better (>), about the same (≈),"
        " worse (<) or much worse (≪). Win rate: a tie is half a win.",
        [
            *(Column(f"preference/{sign}", sign, ".1%", None) for sign in _SIGNS),
            Column("preference/win_rate", "Win rate", ".1%", None),
            Column("preference/answers", "Answers", ",d", None),
        ],
    ),
    Table(
        "Sign test over prompts, and agreement of raters",
        "Better: prompts on which more raters prefer the first generator's image than the second's. p:"
        " two-sided, without tied prompts. Alpha: Krippendorff's, ordinal.",
        [
            *(
                Column(f"sign_test/{name}", name.capitalize(), ",d", None, "Prompts")
                for name in ("better", "worse", "tied")
            ),
            Column("sign_test/p", "p", ".2g", None, "Sign test"),
            Column("agreement/alpha", "Alpha", "z.3f", None, "Agreement"),
        ],
    ),
    Table(
        "Bradley-Terry ratings",
        "Elo points of mean 0: 100 more points win 64 % of the comparisons, 400 more win 91 %. A tie is half"
        " a win.",
        [Column("rating", "Rating", "+.0f")],
    ),
    Table(
        "Raters and their attention checks",
        "Left: share of answers that prefer the left image, a tie is half. An identical pair is passed by"
        ' "about the same", a swapped repeat by an answer at most one step from the first.',
        [
            Column("raters/answers", "Answers", ",d", None, "All"),
            Column("raters/left_share", "Left", ".0%", None, "All"),
            *(
                Column(f"raters/{check}/{count}", count.capitalize(), ",d", None, check.capitalize())
                for check in CHECKS
                for count in ("passed", "asked")
            ),
        ],
    ),
    Table(
        "By prompt",
        "Number of each answer; the prompts that the first generator wins most often stand first.",
        [
            *(Column(f"prompt/{sign}", sign, "d", None) for sign in _SIGNS),
            Column("prompt/win_rate", "Win rate", ".0%", None),
        ],
    ),
)


def rows(result: Mapping, with_prompts: bool) -> list[Row]:
    """Makes the tables' rows of `statistics.result`.

    Args:
      result: the result.
      with_prompts: whether each prompt gets a row.
    """
    found = [_pair(pair) for pair in result["pairs"]]
    for name, rating in (result["bradley_terry"] or {}).items():
        found.append(_row(name, {"rating": rating["rating"]}, {"rating": rating["interval"]}))
    for name, rater in result["checks"].items():
        counts = {f"raters/{check}/{n}": count for check in CHECKS for n, count in rater[check].items()}
        shares = {f"raters/{name}": rater[name] for name in ("answers", "left_share")}
        found.append(_row(name, shares | counts))
    for row in sorted(result["by_prompt"], key=lambda row: -row["win_rate"]) if with_prompts else ():
        name = row["prompt"] if len(result["pairs"]) == 1 else f"{row['prompt']}: {_versus(row)}"
        counts = {f"prompt/{sign}": count for sign, count in zip(_SIGNS, row["counts"], strict=True)}
        found.append(_row(name, counts | {"prompt/win_rate": row["win_rate"]}))
    return found


def notes(result: Mapping) -> list[str]:
    """Returns what stands below the tables."""
    found = [
        f"{result['answers']:,} answers of {result['raters']:,} raters on {result['prompts']:,} prompts.",
        "Brackets: 95 % intervals over other prompts and other raters.",
    ]
    if not all(pair["win_rate_interval"] for pair in result["pairs"]):
        found.append("Without brackets: an interval needs two raters or more, who share prompts.")
    if len(result["pairs"]) > 1 and not result["bradley_terry"]:
        found.append(
            "No Bradley-Terry ratings: some generators won, or lost, all comparisons with the others, or were"
            " never compared with them."
        )
    return found


def _versus(row: Mapping) -> str:
    return f"{row['first']} vs {row['second']}"


def _pair(pair: Mapping) -> Row:
    names = [f"preference/{name}" for name in (*_SIGNS, "win_rate")]
    shares = dict(zip(names, (*pair["shares"], pair["win_rate"]), strict=True))
    intervals = dict(zip(names, (*pair["intervals"], pair["win_rate_interval"]), strict=True))
    others = {"preference/answers": pair["answers"], "agreement/alpha": pair["krippendorff_alpha"]}
    test = {f"sign_test/{name}": value for name, value in pair["sign_test"].items()}
    return _row(_versus(pair), shares | others | test, intervals)


def _row(name: str, metrics: Mapping, intervals: Mapping[str, Sequence[float] | None] | None = None) -> Row:
    """Makes a row without what is None."""
    known = {key: value for key, value in metrics.items() if value is not None}
    ends = {key: (value[0], value[1]) for key, value in (intervals or {}).items() if value}
    return Row(name, known, intervals=ends)
