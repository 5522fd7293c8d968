"""Writes files by each function of `writing`, for test_power_cut: python writes.py ROOT.

After each, a marker appears, which tells the test that the function has returned.
"""

import pathlib
import sys

from richhf_jax import writing

ROOT = pathlib.Path(sys.argv[1])
LONG = bytes(range(256)) * 50  # some pages


def returned(name: str) -> None:
    (ROOT / "returned" / name).touch()


def main() -> None:
    (ROOT / "returned").mkdir()
    writing.write(ROOT / "file", LONG)
    returned("file")
    writing.write(ROOT / "file", LONG[::-1])
    returned("file again")
    with writing.atomic(ROOT / "parts") as new, new.open("wb") as file:
        for start in range(0, len(LONG), 1000):
            file.write(LONG[start : start + 1000])
            file.flush()
    returned("parts")
    writing.make_folder(ROOT / "some/deep/folder")
    writing.write(ROOT / "some/deep/folder/file", LONG)
    returned("folder")
    with writing.new_directory(ROOT / "another/deep/directory", "--to") as directory:
        (directory / "inner/most").mkdir(parents=True)
        for place in ("a", "inner/b", "inner/most/c"):
            (directory / place).write_bytes(LONG)
    returned("directory")
    (ROOT / "unfinished/inner").mkdir(parents=True)
    (ROOT / "unfinished/inner/a").write_bytes(LONG)
    writing.move(ROOT / "unfinished", ROOT / "moved")
    returned("moved")


if __name__ == "__main__":
    main()
