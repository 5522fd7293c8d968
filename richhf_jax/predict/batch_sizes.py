"""The batch sizes that a predictor compiles: a few, up to the largest that the devices' memory takes."""

import threading
from collections.abc import Callable

from richhf_jax import device_memory
from richhf_jax.costs import plan

# Images in the largest batch, if nobody says otherwise.
DEFAULT = 16
# What to do where a batch doesn't fit.
FIX = "A smaller batch size (--batch-size) takes less, and other programs that end leave more"
# Ratio between consecutive compiled batch sizes.
_RATIO = 4


def compiled_sizes(largest: int, multiple: int) -> list[int]:
    """Returns a few batch sizes, each a multiple of the devices, up to the largest (rounded up)."""
    sizes = {multiple}  # The smallest makes a single image quick.
    while largest >= 1:
        sizes.add(-(-largest // multiple) * multiple)
        largest //= _RATIO
    return sorted(sizes)


class BatchSizes:
    """A few batch sizes. The default ones shrink if the memory is too small; those that the user chose don't.

    Attributes:
      is_default: whether nobody chose a size.
      sizes: the sizes, smallest first.
    """

    def __init__(self, largest: int | None, multiple: int):
        """Makes the sizes.

        Args:
          largest: images in the largest batch, rounded up to a multiple of the devices; None: `DEFAULT`.
          multiple: number of devices that share a batch.
        """
        self.is_default = largest is None
        self._multiple = multiple
        self.sizes = compiled_sizes(largest or DEFAULT, multiple)
        self._fitting = 0  # The largest size that is known to fit.
        self._lock = threading.Lock()

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def rows(self, images: int) -> int:
        """Returns the least size for so many images; for more than the largest has, the largest."""
        return next((size for size in self.sizes if size >= images), self.largest)

    def fits(self, images: int) -> bool:
        """Returns whether a batch for so many images is known to fit."""
        return self.rows(images) <= self._fitting

    def fit(self, images: int, room: int, check: Callable[[int], None]) -> str:
        """Makes the sizes smaller, until a batch of `rows(images)` fits.

        A size that doesn't fit takes a compilation, so the next is estimated: a batch's memory grows with its
        images.

        Args:
          images: number of images.
          room: bytes that there are for a batch.
          check: compiles for so many rows; raises what `device_memory.is_lack` knows if they don't fit.

        Returns:
          A sentence about the smaller size and its reason; "" if nothing changed.

        Raises:
          Exception: that of `check`, if no smaller size is left, or the user chose this one.
        """
        with self._lock:
            first = rows = self.rows(images)
            told = ""
            while rows > self._fitting:
                try:
                    check(rows)
                    self._fitting = rows
                except Exception as error:
                    halves = self._halves(rows)
                    if not device_memory.is_lack(error) or not self.is_default or not halves:
                        raise
                    rows, reason = _smaller(error, rows, room, halves)
                    told = told or reason
            if rows == first:
                return ""
            self.sizes = compiled_sizes(rows, self._multiple)
            return f"batches of {rows} images: {told}"

    def _halves(self, rows: int) -> list[int]:
        """Returns smaller sizes, down to one row a device, largest first."""
        halves = []
        while rows > max(self._multiple, self._fitting):
            rows = -(-(rows // 2) // self._multiple) * self._multiple
            halves.append(rows)
        return halves


def _smaller(error: Exception, rows: int, room: int, halves: list[int]) -> tuple[int, str]:
    """Returns the size to try after one that doesn't fit, and a clause that says why it doesn't."""
    if not isinstance(error, device_memory.OutOfMemoryError):
        # A compiler that gives up doesn't say how much is needed.
        return halves[0], f"the compiler finds no memory for {rows}"
    size = next((half for half in halves if error.needed * half <= room * rows), halves[-1])
    return size, f"{rows} need {plan.size(error.needed)} of memory, there are {plan.size(room)}"
