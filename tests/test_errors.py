import io
import sys

import pytest

from richhf_jax import errors


def test_a_mistake_ends_a_command_with_its_message(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))

    @errors.command("score")
    def main():
        print("≥ \udcff")
        raise errors.UserError("a\x1b]0;owned\x07.png:\n\u202egnp is broken\u2028")

    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == "score: a\\x1b]0;owned\\x07.png:\n\\u202egnp is broken\\u2028"
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\\u2265 \\udcff\n"


def test_other_errors_pass_and_a_name_may_be_left_out():
    with pytest.raises(SystemExit, match="^no file$"), errors.command():
        raise errors.UserError("no file")
    with pytest.raises(KeyError), errors.command():
        raise KeyError("a bug")
