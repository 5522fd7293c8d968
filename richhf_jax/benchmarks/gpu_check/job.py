"""Runs one job of the check in a process of its own. `richhf_jax.benchmarks.gpu_check` starts it:

    python -m richhf_jax.benchmarks.gpu_check.job train-8 --size=base

It writes messages for `turns.Scheduler` to standard output, and waits for its turn on standard input.
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable

from richhf_jax.benchmarks.gpu_check import plan, turns

turns.end_with_parent()  # At once, because the other imports take seconds.

from absl import logging as absl_logging  # noqa: E402

from richhf_jax import errors, gin_utils  # noqa: E402
from richhf_jax.benchmarks.gpu_check import machine, model, parts, uses  # noqa: E402
from richhf_jax.benchmarks.gpu_check.context import Context  # noqa: E402

# Job's name -> function; it gets the name's groups, numbers as numbers.
_JOBS: dict[str, Callable[..., None]] = {
    "versions": machine.versions,
    "ceilings": machine.ceilings,
    "numbers": machine.numbers,
    r"(train|predict)-(\d+)": model.step,
    rf"(train|predict)-(\d+)-({'|'.join(plan.WAYS)})": model.step,
    r"torch-(train|predict)-(\d+)": model.torch_step,
    "attention": model.attention,
    rf"part-({'|'.join(plan.PARTS)})": parts.part,
    r"command-(\d+)": uses.command,
    "export": uses.export,
    r"learn-(\d+)": uses.learn,
}


@errors.command()
def main() -> None:
    """Runs the job that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m richhf_jax.benchmarks.gpu_check.job", description=__doc__
    )
    parser.add_argument("job")
    parser.add_argument("--size", choices=list(plan.SIZES), required=True)
    parser.add_argument("--gin_bindings", action="append", default=[])
    options = parser.parse_args(gin_utils.rewrite_gin_args(sys.argv[1:]))
    turn = turns.Turn()
    absl_logging.set_verbosity(absl_logging.WARNING)
    # gin's own warnings go to the root logger.
    logging.getLogger().addFilter(gin_utils.is_for_the_user)
    check = Context(turn, plan.SIZES[options.size], options.gin_bindings)
    if options.gin_bindings:
        check.model()  # Every job tells a mistake in them, also one that doesn't use them.
    matches = ((re.fullmatch(pattern, options.job), function) for pattern, function in _JOBS.items())
    match, function = next((match, function) for match, function in matches if match)
    arguments = [int(group) if group.isdecimal() else group for group in match.groups()]
    try:
        function(check, *arguments)
    except turns.Skip as reason:
        turn.skip(str(reason))


if __name__ == "__main__":
    main()
