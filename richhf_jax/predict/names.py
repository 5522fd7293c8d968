"""Names the files of images by the images' ids. Different ids never share a file, on any file system."""

import hashlib
import re
import urllib.parse

# Longest file name, and longest relative path, in bytes. Most file systems take names of 255 bytes.
_MAX_NAME = 200
_MAX_PATH = 1000
# Needs no change: parts without special characters, no folder's name with a dot.
_PLAIN = re.compile(r"(?:[\w-]+/)*[\w-]+(?:\.[\w-]+)*", re.ASCII)
# Windows drops these at the end of a folder's name.
_DROPPED = re.compile(r"[. ]+$")


class FileNames:
    """Gives each id a file name of its own.

    Some file systems take "A" and "a" for one name. So of two ids that differ in capitals alone, the later
    one gets a name with a hash.
    """

    def __init__(self):
        self._ids: dict[str, str] = {}  # A name in small letters -> its id.

    def add(self, name: str) -> tuple[str, bool]:
        """Returns an id's file name, and whether the id was there before."""
        path = file_name(name)
        if self._ids.get(path.lower(), name) != name:
            path = _hashed(path.replace("/", "%2F"))
        # The same string takes memory once.
        key = name if path.lower() == name else path.lower()
        again = key in self._ids
        self._ids[key] = name
        return path, again


def file_name(name: str) -> str:
    """Returns a relative path for an id. Paths of different ids differ, maybe in capitals alone.

    Special characters are percent-encoded. "%" is put behind a folder's name that could be a picture's. A
    long name is cut; "%=", which no other name has, and a hash follow.

    >>> file_name("cats/1.png"), file_name("../a b?.png"), file_name("a.png/b")
    ('cats/1.png', '%2E%2E/a b%3F.png', 'a.png%/b')
    """
    if len(name) <= _MAX_NAME and _PLAIN.fullmatch(name):  # Most ids; there may be millions.
        return name
    *folders, last = [urllib.parse.quote(part, safe=" ,()[]+=@~") for part in name.split("/")]
    last = last.replace(".", "%2E") if set(last) <= {"."} else last
    path = "/".join(map(_short, [*map(_folder, folders), last or "%"]))
    return path if len(path) <= _MAX_PATH else _hashed(path.replace("/", "%2F"))


def _folder(part: str) -> str:
    part = _DROPPED.sub(lambda end: "".join(f"%{ord(character):02X}" for character in end[0]), part)
    return f"{part}%" if not part or part.lower().endswith(".png") else part


def _short(part: str) -> str:
    return part if len(part) <= _MAX_NAME else _hashed(part)


def _hashed(part: str) -> str:
    return f"{part[:100]}%={hashlib.sha256(part.encode()).hexdigest()[:32]}"
