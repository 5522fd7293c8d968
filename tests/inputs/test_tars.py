"""Tests the reader of tars: links, other kinds of members, gzip, limits, and thousands of damaged tars."""

import collections
import gzip
import io
import tarfile
import tracemalloc

import hypothesis
import pytest
from hypothesis import strategies

from richhf_jax import errors, inputs
from richhf_jax.inputs import archives, tars
from tests.inputs.mutation import mutants
from tests.inputs.reading import loaded, read, write_tar

SPECIAL = {
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "device": tarfile.CHRTYPE,
    "fifo": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
}


def tar_of(members, form=tarfile.GNU_FORMAT):
    """Makes a tar of (name, content), or (name, kind of SPECIAL, name of a link's target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content, *target in members:
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = SPECIAL[content], target[0]
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Stream(io.BytesIO):
    """A file that can't seek, as some storages give them."""

    def seekable(self):
        return False

    def seek(self, offset, whence=io.SEEK_SET):
        raise io.UnsupportedOperation("seek")


def contents(data, file=io.BytesIO):
    """Reads (name, content or problem) of each member; the end's problem comes last, as ('', problem)."""
    tar = tars.Tar(io.BufferedReader(file(data)))
    found = []
    try:
        found.extend((member.name, member.problem or tar.read(member)) for member in tar)
    except tars.TarError as error:
        found.append(("", str(error)))
    return found


LINKED = [
    ("./a.png", b"A"),
    ("a.txt", b"a"),
    ("b.png", "link", "./a.png"),
    ("c.png", "link", "b.png"),  # A link to a link.
    ("d.png", "link", "e.png"),
    ("e.png", b"E"),
    ("f.png", "link", "gone.png"),
    ("a.png", b"second"),
    ("g.png", "link", "a.png"),
    (".hidden", b"H"),
    ("h.png", "link", ".hidden"),
    ("i.png", "link", "d.png"),
]
RESOLVED = [
    ("a.png", b"A"),
    ("a.txt", b"a"),
    ("b.png", b"A"),
    ("c.png", b"A"),
    ("d.png", "is a hard link to e.png, which isn't before it in the tar"),
    ("e.png", b"E"),
    ("f.png", "is a hard link to gone.png, which isn't before it in the tar"),
    ("a.png", b"second"),
    ("g.png", b"second"),
    ("h.png", b"H"),
    ("i.png", "is a hard link to d.png, which is a hard link to e.png, which isn't before it in the tar"),
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_hard_links_have_the_content_before_them(form, pack):
    assert contents(pack(tar_of(LINKED, form))) == RESOLVED


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_stream_that_cannot_seek_loses_only_its_links(pack):
    found = contents(pack(tar_of(LINKED[:3])), Stream)
    problem = "is a hard link to a.png, which can't be read again; copy the tar first"
    assert found == [("a.png", b"A"), ("a.txt", b"a"), ("b.png", problem)]


def test_hard_links_of_a_gzipped_tar_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(tars, "_MAX_KEPT", 3)
    members = [("a", b"AA"), ("b", b"BB"), ("c", "link", "a"), ("d", "link", "b")]
    *_, first, second = contents(gzip.compress(tar_of(members)))
    assert first == ("c", b"AA")
    assert second == (
        "d",
        "is a hard link to b, which isn't among the first 3 bytes that are linked; `gunzip` the tar",
    )


def test_other_kinds_of_members_are_told(tmp_path):
    members = [
        ("a.jpg", "symlink", "b.jpg"),
        ("a.txt", b"a"),
        ("b.jpg", b"B"),
        ("b.txt", "device", ""),
        ("c.jpg", "fifo", ""),
        ("d.jpg", "folder", ""),
        ("d.jpg", b"D"),
        ("d.txt", b"d"),
    ]
    (tmp_path / "t.tar").write_bytes(tar_of(members))
    tar = f"{tmp_path}/t.tar"
    assert read(tar) == {
        "a": f"{tar}, a: a.jpg is a symbolic link to b.jpg; pack the tar with `tar --dereference`",
        "b": f"{tar}, b: b.txt is no regular file",
        "c": f"{tar}, c: c.jpg is no regular file",
        "d": (b"D", "d"),
    }


def test_what_is_no_file_is_left_out():
    """GNU's label of a volume and list of a folder, and others that tell how the tar was packed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind in b"VDNAI":
            member = tarfile.TarInfo("0001.jpg")
            member.type, member.size = bytes([kind]), 600
            tar.addfile(member, io.BytesIO(bytes(600)))
        tar.addfile(tarfile.TarInfo("a.jpg"))
    assert contents(buffer.getvalue()) == [("a.jpg", b"")]


def test_times_in_a_header_are_no_part_of_the_name():
    """GNU's `tar -g` writes them where POSIX has a folder."""
    tar = bytearray(tar_of([("a.jpg", b"A"), ("/b.jpg", b"B")]))
    assert contents(tar) == [("a.jpg", b"A"), ("/b.jpg", b"B")]
    for start in (0, 1024):
        tar[start + 345 : start + 357] = b"15302374347\0"
        tar[start + 148 : start + 156] = b" " * 8
        tar[start + 148 : start + 155] = b"%06o\0" % sum(tar[start : start + 512])
    assert contents(tar) == [("a.jpg", b"A"), ("/b.jpg", b"B")]


@pytest.mark.parametrize(("name", "most"), [("a.txt", 20), ("a.caption", 20), ("a.json", 30), ("a.jpg", 40)])
def test_a_text_that_is_larger_than_any_is_not_read(monkeypatch, name, most):
    monkeypatch.setattr(tars, "_TEXTS", {".txt": 20, ".caption": 20, ".json": 30})
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 40)
    assert contents(tar_of([(name, b"x" * most)])) == [(name, b"x" * most)]
    assert contents(tar_of([(name, b"x" * (most + 1))])) == [
        (name, f"has {most + 1} bytes, and at most {most} are taken")
    ]
    assert {".txt", ".caption", ".json"} <= set(tars._TEXTS)


def test_a_sparse_member_is_told():
    header = tar_of([("a.jpg", b"A")])
    sparse = bytearray(header)
    sparse[156:157] = tarfile.GNUTYPE_SPARSE
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    assert contents(bytes(sparse)) == [("a.jpg", "is a sparse file; pack the tar without --sparse")]


@pytest.mark.parametrize("mode", ["w:bz2", "w:xz"])
def test_other_compression_is_named(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    ((_, problem),) = contents(buffer.getvalue())
    assert problem.startswith("compressed by ")
    assert problem.endswith("; unpack it first")


def test_a_gzipped_tar_that_inflates_is_not_inflated(monkeypatch):
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 1 << 20)
    bomb = gzip.compress(tar_of([("a", b"A"), ("b", bytes(50 << 20)), ("c", b"C")]))
    tracemalloc.start()
    try:
        found = contents(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [
        ("a", b"A"),
        ("", f"b has {50 << 20} bytes, and at most {1 << 20} are taken in a compressed tar"),
    ]
    assert peak < 2 << 20


def test_a_large_member_of_a_plain_tar_loses_no_other(monkeypatch):
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 3)
    found = contents(tar_of([("a", b"A"), ("b", b"1234"), ("c", b"C")]))
    assert found == [("a", b"A"), ("b", "has 4 bytes, and at most 3 are taken"), ("c", b"C")]


def test_a_header_that_claims_gigabytes():
    data = bytearray(tar_of([("n" * 200, b"A"), ("b", b"B")]))  # A header with the long name comes first.
    data[124:136] = b"%011o\0" % (5 << 30)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    ((_, problem),) = contents(bytes(data))
    assert problem == f"a header of {5 << 30} bytes"


def test_halves_that_wait_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_WAITING", 3)
    names = ["a.jpg", "a.txt", *(f"{number}.jpg" for number in range(9)), "z.jpg", "z.txt"]
    write_tar(tmp_path / "t.tar", [(name, b"x") for name in names])
    found = read(tmp_path / "t.tar")
    assert found.pop("a") == (b"x", "x")
    assert "3 files wait for their pair; pack the tar with `tar --sort=name`" in found.pop("t.tar:end")
    assert list(found) == ["0", "1", "2", "3"]


# Few names, so that they repeat, link to each other and have the same key.
NAMES = strategies.sampled_from(
    ["a.jpg", "a.TXT", "./b.png", "b.txt", "in/a.jpg", "in/a.txt", "._a.jpg", "a.json"]
)
MEMBERS = strategies.lists(
    strategies.one_of(
        strategies.tuples(NAMES), strategies.tuples(NAMES, strategies.sampled_from(sorted(SPECIAL)), NAMES)
    ),
    max_size=12,
)


@hypothesis.given(members=MEMBERS, pack=strategies.sampled_from([bytes, gzip.compress]))
@hypothesis.settings(max_examples=150)
def test_every_member_has_the_content_that_unpacking_would_give(members, pack):
    hypothesis.assume(not any("sparse" in member for member in members))
    members = [
        (name, b"%d" % number) if not more else (name, *more) for number, (name, *more) in enumerate(members)
    ]
    on_disk, expected = {}, []
    for name, content, *target in ((name.removeprefix("./"), *more) for name, *more in members):
        if target:
            content = on_disk.get(target[0].removeprefix("./")) if content == "link" else None
        on_disk[name] = content
        if not name.startswith("._") and not (target and dict(members_of(members)).get(name) == "folder"):
            expected.append((name, content))
    found = [
        (name, content if isinstance(content, bytes) else None)
        for name, content in contents(pack(tar_of(members)))
    ]
    assert [pair for pair in found if pair[1]] == [pair for pair in expected if pair[1]]


def members_of(members):
    return [(name.removeprefix("./"), content) for name, content, *target in members if target]


def pairs_of_three(form):
    members = [
        (f"{n}.{end}", b"%s %d" % (word, n))
        for n in range(3)
        for end, word in (("jpg", b"J"), ("txt", b"cat"))
    ]
    return tar_of([*members, ("3.jpg", "link", "1.jpg"), ("3.txt", b"cat 1")], form)


def test_thousands_of_damaged_tars():
    whole = [pairs_of_three(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    kinds = collections.Counter()
    for data in mutants(whole, 9_000):
        for name, content in contents(data):
            kinds[bool(name), type(content)] += 1
    assert kinds[True, bytes] > 20_000
    assert kinds[False, str] > 5_000


def test_thousands_of_damaged_tars_are_scored_or_listed(tmp_path):
    whole = pairs_of_three(tarfile.GNU_FORMAT)
    path = tmp_path / "t.tar"
    scored = failed = 0
    for data in mutants([whole], 1_000):
        path.write_bytes(data)
        try:
            given = inputs.Inputs([str(path)])
        except errors.UserError:  # Nothing in it is a pair.
            continue
        records = list(given)
        assert len(records) == len(given)
        for record in records:
            match loaded(record):
                case str():
                    failed += 1
                case (image, prompt):
                    scored += 1
                    # A tar has no checksum of contents. But no image has the whole prompt of another one.
                    both = {image.decode(errors="replace")[2:], prompt[4:]}
                    assert len(both) == 1 or not both <= {"0", "1", "2"}
    assert scored > 1_000
    assert failed > 1_000


def test_thousands_of_damaged_gzipped_tars():
    whole = gzip.compress(pairs_of_three(tarfile.GNU_FORMAT), mtime=0)
    ends = sum(contents(data)[-1][0] == "" for data in mutants([whole], 1_000))
    assert ends > 800
