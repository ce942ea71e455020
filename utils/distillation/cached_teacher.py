"""A teacher whose outputs are on disk: computed in one pass before the first optimizer step, then only read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.articles import DataError
from data.batches import WINDOW, load_batches, micro_batches
from data.teacher_cache import KEY, ArrayShape, TeacherCache
from data.tokenized import TokenizedDataset
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.losses.vocabulary_loss import TeacherHidden, TeacherTopK, top_k_of
from model.objective import arguments_of
from model.teacher import Teacher, move_head
from model.transfer import to_device
from utils.config.distill import DistillationKwargs
from utils.progress import progress_bar
from utils.training.distributed import DistributedContext
from utils.training.random_state import forked_random_state

HEAD = "head.safetensors"


class CachedTeacher:
    """What `TeacherStudent` asks of a teacher, read from disk once `prepare` has been called.

    load: returns the teacher; called only if rows are missing. fingerprint: of its weights. width: of its hidden
    states. vocabulary: number of real tokens. cache_dir: holds a folder for each table. log: takes lines for the user.
    """

    def __init__(
        self,
        load: Callable[[], Teacher],
        fingerprint: str,
        width: int,
        vocabulary: int,
        options: DistillationKwargs,
        cache_dir: str | Path,
        context: DistributedContext,
        log: Callable[[str], None],
    ):
        cache = options.teacher_cache
        self.load, self.vocabulary, self.temperature = load, vocabulary, options.temperature
        self.chunk_size, self.context, self.log = options.chunk_size, context, log
        self.cache_dir, self.kind = Path(cache_dir), cache.kind
        self.key = [fingerprint, cache.kind, context.precision, vocabulary]
        if cache.kind == "hidden":
            stored = context.precision if cache.dtype == "auto" else cache.dtype
            # NumPy has no bfloat16
            self.arrays = {"hidden": ArrayShape(width, "uint16" if stored == "bfloat16" else stored)}
            self.key.append(stored)
        else:
            k = min(cache.top_k, vocabulary)
            ids = "uint16" if vocabulary <= 1 << 16 else "uint32"
            self.arrays = {"ids": ArrayShape(k, ids), "log_probs": ArrayShape(k, "float32"),
                           "log_rest": ArrayShape(1, "float32")}
            self.key += [k, options.temperature]
        self.head: OutputHead | None = None
        self._caches: dict[str, TeacherCache] = {}

    def cache_of(self, table: TokenizedDataset) -> TeacherCache:
        return TeacherCache(self.cache_dir, table, self.key, self.arrays)

    def is_complete(self, table: TokenizedDataset) -> bool:
        """Whether all rows of a table are on disk already. Changes nothing."""
        return self.cache_of(table).rows_done == len(table)

    def prepare(
        self, tables: Iterable[TokenizedDataset], batch_size: int, tokens_per_batch: int | None, pad_id: int
    ) -> None:
        """Open the caches of all tables that will be read, after computing the rows that are missing.

        Every process of a group calls it. The teacher is loaded if a row is missing, and freed at the end; the global
        random generators are as before.

        Raises:
            DataError: the cache cannot be written, or is damaged.
        """
        teacher = None
        with forked_random_state():
            for table in tables:
                cache = self._caches[table.name] = self.cache_of(table)
                try:
                    if not self.context.broadcast_object(cache.rows_done == len(table)):
                        teacher = teacher or self.load()
                        self._fill(cache, table, teacher, batch_size, tokens_per_batch, pad_id)
                    cache.open()
                except OSError as error:
                    raise DataError(f"{KEY}: {cache.folder}: {error.strerror or error}: free up space there, or name "
                                    "another folder") from error
                self.log(f"teacher cache: all {len(table):,} rows of {table.name} ({cache.nbytes / 1e9:.3f} GB) are in "
                         f"{cache.folder}")
                if self.kind == "hidden" and self.head is None:
                    self.head = self._read_head(cache.folder / HEAD)

    def _fill(self, cache, table, teacher: Teacher, batch_size, tokens_per_batch, pad_id) -> None:
        """Compute the missing rows, window by window; the processes of a group share the batches of each window."""
        context = self.context
        cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(cache.folder / ".lock") if context.is_main else nullcontext():
            done = context.broadcast_object(cache.rows_done)
            self.log(f"teacher cache: computing {len(table) - done:,} of {len(table):,} rows of {table.name}")
            if context.is_main and not done:
                cache.create()
                if self.kind == "hidden":
                    self._write_head(cache.folder / HEAD, teacher)
            context.barrier()
            cache.open(writable=True)
            with progress_bar(f"teacher outputs of {table.name}", len(table), "row", done, context.is_main) as bar:
                for start in range(done, len(table), WINDOW):
                    end = min(start + WINDOW, len(table))
                    batches = micro_batches(np.arange(start, end), table.lengths, batch_size, tokens_per_batch)
                    for batch in load_batches(table, batches[context.rank :: context.world_size], pad_id):
                        hidden = teacher.hidden(*arguments_of(batch))
                        if not hidden.isfinite().all():
                            raise DataError(f"the teacher's outputs are not finite in {table.name}, rows: "
                                            f"{', '.join(table.names(batch['rows']))}: look at these rows, or set "
                                            "trainer_kwargs.precision to float32")
                        cache.write(batch["rows"], self._to_arrays(teacher, hidden))
                        bar.update(len(batch["rows"]))
                    cache.flush()
                    context.barrier()
                    if context.is_main:
                        cache.save_progress(end)
                    bar.update(end - bar.n)

    def iter_steps(self, table: TokenizedDataset, batches: Iterable[dict]) -> Iterator[tuple]:
        """The arguments of `TeacherStudent.forward` for each collated batch of a table's rows."""
        cache = self._caches[table.name]
        for batch in batches:
            yield *arguments_of(batch), self._from_arrays(cache.read(batch["rows"]))

    # -- stored form ---------------------------------------------------------------------------------------------

    def _to_arrays(self, teacher: Teacher, hidden: Tensor) -> dict[str, np.ndarray]:
        """The arrays of hidden states [N, Dt]."""
        if self.kind == "hidden":
            if self.arrays["hidden"].dtype == "uint16":
                return {"hidden": hidden.to("cpu", torch.bfloat16).view(torch.uint16).numpy()}
            return {"hidden": hidden.to("cpu", torch.float32).numpy()}
        parts = [self._top_k(teacher, part) for part in teacher.to_student(hidden).hidden.split(self.chunk_size)]
        ids, log_probs, log_rest = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return {"ids": ids, "log_probs": log_probs, "log_rest": log_rest[:, None]}

    @torch.no_grad()
    def _top_k(self, teacher: Teacher, hidden: Tensor) -> TeacherTopK:
        head = cut_head(teacher.head, self.vocabulary)
        logits, _ = head_logits(hidden.to(head.weight.dtype), head, torch.float32, with_slope=False)
        return top_k_of(torch.log_softmax(logits / self.temperature, -1), self.arrays["ids"].width)

    def _from_arrays(self, found: dict[str, np.ndarray]) -> TeacherHidden | TeacherTopK:
        """The arrays as `TeacherStudent` takes them, on the student's device."""
        device = self.context.device
        if self.kind == "hidden":
            hidden = torch.from_numpy(found["hidden"])
            hidden = hidden.view(torch.bfloat16) if hidden.dtype == torch.uint16 else hidden
            return TeacherHidden(to_device(hidden, device), self.head)
        ids = torch.from_numpy(found["ids"].astype("int64"))
        log_probs, log_rest = torch.from_numpy(found["log_probs"]), torch.from_numpy(found["log_rest"][:, 0])
        return TeacherTopK(*(to_device(values, device) for values in (ids, log_probs, log_rest)))

    def _write_head(self, path: Path, teacher: Teacher) -> None:
        head = cut_head(teacher.language_model.output_head(), self.vocabulary)._asdict()
        tensors = {name: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else
                   torch.as_tensor(value, device="cpu").contiguous().clone()
                   for name, value in head.items() if value is not None}
        path.write_bytes(save(tensors))  # save_file would make a file that only its owner can read

    def _read_head(self, path: Path) -> OutputHead:
        """The head that `_write_head` wrote, on the student's device, in the type of its products."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}): delete {path.parent}, it is then computed again") from error
        head = OutputHead(**{name: value if value.dim() else value.item() for name, value in tensors.items()})
        with self.context.autocast():
            return move_head(head, self.context.device, autocast_type(head.weight.to(self.context.device)))
