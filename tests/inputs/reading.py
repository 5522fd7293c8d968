"""Writers of inputs for the tests, and readers of their records."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from richhf_jax import errors, inputs


def write(folder, files):
    """Writes files by name, with their folders; a string's line ends stay as they are."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_parquet(path, row_group_size=None, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def numbered(path, rows, row_group_size, size=4):
    """Writes a table whose row 7 has the prompt 'p7' and the image b'0007...' of `size` bytes."""
    images = [f"{row:04}".encode().ljust(size, b"x") for row in range(rows)]
    write_parquet(path, row_group_size, image=images, prompt=[f"p{row}" for row in range(rows)])
    return images


def write_tar(path, members, **options):
    """Writes a tar of members by name, in this order; a name may occur twice."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def loaded(record):
    """Returns what load() gives, or the message of its InputError, which has one line."""
    try:
        return record.load()
    except inputs.InputError as error:
        message = str(error)
        assert message.splitlines() == [message]
        message.encode()
        return message


def read(*paths, prompt=None, needs_prompts=True):
    """Returns id -> what is loaded, in order; asserts that a second pass and len() agree."""
    given = inputs.Inputs([str(path) for path in paths], prompt, needs_prompts)
    records = list(given)
    found = {record.id: loaded(record) for record in records}
    assert len(found) == len(records)
    assert [record.id for record in given] == list(found)
    assert len(given) == len(found)
    for name in found:
        name.encode()
    return found


def user_error(*paths, prompt=None):
    """Returns the message for the user if the inputs are refused at once."""
    with pytest.raises(errors.UserError) as caught:
        inputs.Inputs([str(path) for path in paths], prompt)
    return str(caught.value)
