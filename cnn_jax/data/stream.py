"""Photos that do not fit in memory: decoded when they are needed, ahead of the device.

`PhotoImages` takes the place of an array of images, `read_ahead` reads any images in blocks, and
`BatchStream` gives the batches of training in their order, by grain.
"""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from typing import Any

import numpy as np
from absl import flags, logging

from cnn_jax import memory
from cnn_jax.data.dataset import Failure, Images, LazyImages
from cnn_jax.errors import UserError

# As many as ThreadPoolExecutor starts; each holds a whole photo in memory.
_THREADS = min(32, (os.cpu_count() or 1) + 4)
CHUNK_BYTES = 2**26
"""Size of the images that a segment of training gets at once, and that are read ahead."""
_AUTO_SHARE = 4
"""With runtime.storage=auto, images are streamed that fill more than the free memory over this."""


@dataclass(frozen=True, eq=False)
class PhotoImages(LazyImages):
    """Photos that are decoded whenever they are indexed."""

    root: str
    files: tuple[str, ...]
    """Paths relative to `root`."""
    labels: np.ndarray
    """Classes of the photos; equal ones may stand in for each other."""
    side: int
    load: Callable[[str], np.ndarray]
    """Returns a file as uint8 [side, side, 3], or raises UserError; it can be pickled."""
    skip_broken: bool = False
    """Whether the next photo of the same class replaces one that can't be read."""
    broken: dict[str, str] = field(default_factory=dict)
    """The files that were replaced so far, and why; shared by all parts of a data set."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number, height, width and channels."""
        return (len(self.files), self.side, self.side, 3)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the photos of these numbers, decoded by threads."""
        images = memory.empty_images(len(indices), *self.shape[1:])

        def read_into(place: int, index: int) -> None:
            images[place], failures = self.read_one(index)
            self.note(failures)

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(read_into, range(len(indices)), indices.tolist()):
                pass
        return images

    def read_one(self, index: int) -> tuple[np.ndarray, Sequence[Failure]]:
        """Returns a photo and no failures; or the one that replaces it, and what could not be read.

        Raises:
            UserError: it can't be read and is not to be replaced, or nothing can replace it.
        """
        failures: list[Failure] = []
        for candidate in self._candidates(index):
            file = self.files[candidate]
            try:
                return self.load(os.path.join(self.root, file)), failures
            except UserError as error:
                if not self.skip_broken:
                    raise UserError(
                        f"{error}; restore it, or replace such photos with --data.skip_broken=true"
                    ) from None
                failures.append((file, str(error)))
        raise UserError(f"no photo of a class can be read: {failures[0][1]}")

    @property
    def replaced(self) -> tuple[str, ...]:
        """The files in whose place others were returned."""
        return tuple(sorted(self.broken))

    def note(self, failures: Sequence[Failure]) -> None:
        """Adds what was replaced to `broken`, with a warning for each new file."""
        for file, reason in failures:
            if self.broken.setdefault(file, reason) is reason:
                logging.warning("%s; another photo of its class replaces it", reason)

    def take(self, mask: np.ndarray) -> "PhotoImages":
        """Returns the photos where `mask` is true, without reading them."""
        files = tuple(itertools.compress(self.files, mask))
        return replace(self, files=files, labels=self.labels[mask])

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        same = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(same, -int(np.searchsorted(same, index)))[1:].tolist()


def is_chosen(storage: str, nbytes: int) -> bool:
    """Returns whether images of this size are streamed.

    Args:
        storage: `runtime.storage`.
        nbytes: the size of all decoded images.

    Raises:
        UserError: they are to be held in memory and are larger than what is free.
    """
    if storage == "stream":
        return True
    free = memory.free_bytes()
    if storage == "auto":
        return nbytes > free / _AUTO_SHARE
    if nbytes > free:
        raise UserError(
            f"decoded images of {memory.format_bytes(nbytes)} do not fit into "
            f"{memory.format_bytes(free)} of free memory; set runtime.storage=stream, or a lower "
            "data.image_size"
        )
    return False


def read_ahead(images: Images, numbers: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the images of each array of numbers, while it reads those of the next."""
    if isinstance(images, np.ndarray):
        yield from (images[chosen] for chosen in numbers)
        return
    with ThreadPoolExecutor(1) as pool:
        reading = None
        for chosen in numbers:
            before, reading = reading, pool.submit(images.read, chosen)
            if before is not None:
                yield before.result()
        if reading is not None:
            yield reading.result()


class BatchStream:
    """The batches of training from some step on, decoded ahead of their use.

    What it gives is a function of `numbers` alone, whatever the number of workers: resuming needs
    the number of the step and no state of a reader.
    """

    def __init__(
        self,
        images: LazyImages,
        numbers: Callable[[int], np.ndarray],
        start: int,
        end: int,
        *,
        workers: int,
        most: int,
    ) -> None:
        """Starts to read.

        Args:
            images: the training images.
            numbers: returns the images of a step, integers [batch]; those of this process alone,
                where there are several. It can be pickled.
            start: the first step that is read.
            end: the step after the last one.
            workers: the number of processes that decode photos; 0: threads of this one.
            most: the largest number of batches that are taken at once. So many more are held ready.
        """
        import grain  # It imports JAX, which takes a second.

        self.waited = 0.0
        """Seconds that the last call of `take` took, nothing if all was decoded in time."""
        self._images = images
        batch = len(numbers(start))
        self._shape = (most, batch, *images.shape[1:])
        options = grain.ReadOptions(_THREADS, 2 * _THREADS)
        examples = _Examples(images, numbers, start, end, batch)
        dataset = grain.MapDataset.source(examples).to_iter_dataset(options)
        if workers and isinstance(images, PhotoImages):
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain asks for flags of its own
            # Through pipes: shared memory is scarce in containers, and is left behind by a kill.
            by_pipe = grain.experimental.DatasetOptions(min_shm_size=2**40)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, by_pipe)
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=8)
            dataset = dataset.mp_prefetch(options, _set_up_worker)
        dataset = dataset.batch(batch, batch_fn=_join)
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=most)
        self._iterator = iter(dataset)

    def take(self, n_steps: int) -> np.ndarray:
        """Returns the next `n_steps` batches, with undefined ones behind them if there may be more.

        Returns:
            uint8 [most, batch, height, width, 3].

        Raises:
            UserError: a photo can't be read, or a process that decodes has died.
        """
        images = memory.empty_images(*self._shape)
        start = time.perf_counter()
        try:
            for i in range(n_steps):
                images[i], failures = next(self._iterator)
                self._images.note(failures)
        except RuntimeError as error:  # grain's, of a process that was killed
            raise UserError(
                f"a process that decodes photos has ended ({error}); fewer runtime.workers take "
                "less memory"
            ) from None
        self.waited = time.perf_counter() - start
        return images

    def close(self) -> None:
        """Ends the threads or processes that read."""
        self._iterator.close()


@dataclass(frozen=True)
class _Examples:
    """The images of all steps as one sequence, which grain divides among its readers."""

    images: LazyImages
    numbers: Callable[[int], np.ndarray]
    start: int
    end: int
    batch: int

    def __len__(self) -> int:
        return (self.end - self.start) * self.batch

    def __getitem__(self, index: int) -> tuple[np.ndarray, Sequence[Failure]]:
        step, place = divmod(index, self.batch)
        number = int(self.numbers(self.start + step)[place])
        return self.images.read_one(number)


def _join(examples: Sequence[tuple[np.ndarray, Sequence[Failure]]]) -> Any:
    images, failures = zip(*examples, strict=True)
    return np.stack(images), list(itertools.chain(*failures))


def _set_up_worker(_index: int, _count: int) -> None:
    """Leaves signals to the process that trains, and ends with it even if that is killed."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    import jax  # which grain has imported already

    jax.config.update("jax_platforms", "cpu")  # a GPU is for the process that trains
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
