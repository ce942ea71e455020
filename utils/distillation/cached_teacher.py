"""A teacher whose outputs are kept on disk: the first epoch computes them, later ones and later runs only read.

Its body is loaded when a row is first missing, and let go when no row is missing any more.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.articles import DataError
from data.os_errors import describe
from data.scratch import clear_dead
from data.teacher_cache import ArrayShape, TeacherCache, cache_bytes, cache_folder, is_whole, make_cache
from data.tokenized import TokenizedDataset
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.losses.vocabulary_loss import TeacherHidden, TeacherTopK, top_k_of
from model.objective import arguments_of
from model.teacher import Teacher, are_finite, move_head, prefetch_one
from model.transfer import to_device
from utils.config.distill import DistillationKwargs
from utils.training.distributed import DistributedContext
from utils.training.random_state import forked_random_state

HEAD = "head.safetensors"


class CachedTeacher:
    """What `TeacherStudent` asks of a teacher, from disk where it is there.

    load: gives the teacher. fingerprint: of its weights. width: of its hidden states. vocabulary: number of real
    tokens. cache_dir: where the folders of the tables are; None keeps nothing. say: takes lines for the user.
    """

    def __init__(
        self,
        load: Callable[[], Teacher],
        fingerprint: str,
        width: int,
        vocabulary: int,
        options: DistillationKwargs,
        cache_dir: str | Path | None,
        context: DistributedContext,
        say: Callable[[str], None],
    ):
        cache = options.teacher_cache
        self.load, self.vocabulary, self.temperature = load, vocabulary, options.temperature
        self.chunk_size, self.context, self.say = options.chunk_size, context, say
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.kind = cache.kind
        self.key = [fingerprint, cache.kind, context.precision, vocabulary]
        if cache.kind == "hidden":
            stored = context.precision if cache.dtype == "auto" else cache.dtype
            self.arrays = {"hidden": ArrayShape(width, {"float32": "float32", "bfloat16": "uint16"}[stored])}
            self.key.append(stored)
        else:
            k = min(cache.top_k, vocabulary)
            ids = "uint16" if vocabulary <= 1 << 16 else "uint32"
            self.arrays = {"ids": ArrayShape(k, ids), "log_probs": ArrayShape(k, "float32"),
                           "log_rest": ArrayShape(1, "float32")}
            self.key += [k, options.temperature]
        self.head: OutputHead | None = None
        self._teacher: Teacher | None = None
        self._caches: dict[str, TeacherCache] = {}
        self._refused = False

    def open(self, table: TokenizedDataset) -> TeacherCache:
        """The cache of a table; made empty, by the main process, where there is none that is whole.

        Raises:
            DataError: it cannot be written.
        """
        name = table.folder.name
        if name in self._caches:
            return self._caches[name]
        folder = cache_folder(self.cache_dir, table, self.key)
        if self.context.is_main:
            clear_dead(self.cache_dir)
        if self.context.is_main and not is_whole(folder, table, self.arrays):
            damaged = "a damaged one was there; " if folder.exists() else ""
            size = cache_bytes(table, self.arrays) / 1e9
            self.say(f"teacher cache: {damaged}{len(table):,} rows of {name}, {size:.3f} GB in {folder}, filled as "
                     "they are first needed")
            make_cache(folder, table, self.arrays, self.write_head)
        self.context.barrier()
        self._caches[name] = cache = TeacherCache(folder, table, self.arrays)
        if self.kind == "hidden" and self.head is None:
            try:
                head = move_head(read_head(folder / HEAD), self.context.device)
            except (SafetensorError, LookupError, RuntimeError) as error:
                remedy = f"delete {folder}, it is then made anew"
                raise DataError(f"{folder / HEAD} is damaged ({error}): {remedy}") from error
            if not fits(head, self.vocabulary, self.arrays["hidden"].width):
                raise DataError(f"{folder / HEAD} is not of this teacher: delete {folder}, it is then made anew")
            with self.context.autocast():
                self.head = head._replace(weight=head.weight.to(autocast_type(head.weight)))
            if not are_finite(TeacherHidden(head.weight[:0], head)):
                raise DataError(f"{folder / HEAD}: the head of the teacher is not finite: delete {folder}, it is then "
                                "made anew")
        missing = cache.missing()
        if missing and not cache.writable:
            raise DataError(f"distillation_kwargs.teacher_cache.dir: {folder} may only be read, and {missing:,} of its "
                            "rows are missing: name another folder, or make it writable")
        if missing < len(table):
            self.say(f"teacher cache: {len(table) - missing:,} of {len(table):,} rows of {name} are there, in {folder}")
        return cache

    def is_complete(self, table: TokenizedDataset) -> bool:
        """Whether all rows of a table are on disk already. Changes nothing."""
        folder = cache_folder(self.cache_dir, table, self.key)
        return is_whole(folder, table, self.arrays) and not TeacherCache(folder, table, self.arrays).missing()

    # -- what TeacherStudent asks --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """In messages."""
        return f"the teacher's outputs, kept in {self.cache_dir} (delete that folder to have them made anew)"

    def outputs(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> TeacherHidden | TeacherTopK:
        """Of one batch that belongs to no table: computed now."""
        return self.from_stored(self.stored(self.teacher().hidden(input_ids, attention_mask, labels)))

    def iter_steps(self, table: TokenizedDataset, batches: Iterable[dict]) -> Iterator[tuple]:
        """The arguments of `TeacherStudent.forward` for each collated batch of a table's rows."""
        if self.cache_dir is None:
            return prefetch_one(
                batches, lambda batch: self.teacher().hidden(*arguments_of(batch)),
                lambda batch, hidden: (*arguments_of(batch), self.from_stored(self.stored(hidden))),
            )
        cache = self.open(table)

        def start(batch: dict) -> dict[str, np.ndarray] | Tensor:
            found = cache.read(batch["rows"])
            return self.teacher().hidden(*arguments_of(batch)) if found is None else found

        def finish(batch: dict, found: dict[str, np.ndarray] | Tensor) -> tuple:
            if isinstance(found, Tensor):
                computed = self.stored(found)
                if found.isfinite().all():  # else the loss will not be, and no later run is to find it here
                    self.keep(cache, batch["rows"], computed)
                found = cache.read(batch["rows"]) or computed
                self.let_go_when_done()
            return *arguments_of(batch), self.from_stored(found)

        return prefetch_one(batches, start, finish)

    def keep(self, cache: TeacherCache, rows: np.ndarray, computed: dict[str, np.ndarray]) -> None:
        """A disk that refuses costs time later on, not the run."""
        try:
            cache.write(rows, computed)
        except OSError as error:
            if not self._refused:
                self.say(f"teacher cache: {describe(error, cache.folder)}; the run goes on, and computes these rows "
                         "again where it needs them again")
            self._refused = True

    # -- the teacher ---------------------------------------------------------------------------------------------

    def teacher(self) -> Teacher:
        if self._teacher is None:
            with forked_random_state():  # loading may draw random weights first: training must not notice
                self._teacher = self.load()
            if self.cache_dir is None and self.kind == "hidden":
                self.head = cut_head(self._teacher.head, self.vocabulary)
        return self._teacher

    def load_if_needed(self) -> None:
        """Before anything is trained, so that a teacher that cannot be loaded is found then."""
        if any(cache.missing() for cache in self._caches.values()):
            self.teacher()

    def let_go_when_done(self) -> None:
        if self._teacher is not None and not any(cache.missing() for cache in self._caches.values()):
            self._teacher = None
            self.say("teacher cache: all rows are there, the teacher is no longer needed")

    def write_head(self, folder: Path) -> None:
        if self.kind == "hidden":
            head = cut_head(self.teacher().language_model.output_head(), self.vocabulary)
            tensors = {"weight": head.weight, "scale": torch.tensor(head.scale, dtype=torch.float64)}
            optional = {"bias": head.bias, "gaps": head.gaps}
            tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
            if head.cap is not None:
                tensors["cap"] = torch.tensor(head.cap, dtype=torch.float64)
            own = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
            (folder / HEAD).write_bytes(save(own))  # save_file would make a file that only its owner can read

    # -- stored form ---------------------------------------------------------------------------------------------

    def stored(self, hidden: Tensor) -> dict[str, np.ndarray]:
        """The arrays of hidden states [N, Dt]."""
        if self.kind == "hidden":
            if self.arrays["hidden"].dtype == "uint16":  # NumPy has no bfloat16
                rounded = hidden.to("cpu", torch.bfloat16).contiguous()
                return {"hidden": rounded.view(torch.int16).numpy().view("uint16")}
            return {"hidden": hidden.to("cpu", torch.float32).contiguous().numpy()}
        parts = [self.top_k(part) for part in self.teacher().to_student(hidden).hidden.split(self.chunk_size)]
        ids, log_probs, log_rest = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
        return {"ids": ids.astype(self.arrays["ids"].dtype), "log_probs": log_probs, "log_rest": log_rest[:, None]}

    @torch.no_grad()
    def top_k(self, hidden: Tensor) -> TeacherTopK:
        head = cut_head(self.teacher().head, self.vocabulary)
        logits, _ = head_logits(hidden.to(head.weight.dtype), head, torch.float32, with_slope=False)
        return top_k_of(torch.log_softmax(logits / self.temperature, -1), self.arrays["ids"].width)

    def from_stored(self, found: dict[str, np.ndarray]) -> TeacherHidden | TeacherTopK:
        """The arrays as `TeacherStudent` takes them, on the student's device."""
        device = self.context.device
        if self.kind == "hidden":
            values = found["hidden"]
            hidden = torch.from_numpy(values.view("int16") if values.dtype == "uint16" else values)
            hidden = hidden.view(torch.bfloat16) if values.dtype == "uint16" else hidden
            return TeacherHidden(to_device(hidden, device), self.head)
        ids = torch.from_numpy(found["ids"].astype("int64"))
        log_probs, log_rest = torch.from_numpy(found["log_probs"]), torch.from_numpy(found["log_rest"][:, 0])
        return TeacherTopK(*(to_device(each, device) for each in (ids, log_probs, log_rest)))


def read_head(path: Path) -> OutputHead:
    """The head that `CachedTeacher.write_head` wrote."""
    tensors = load_file(path)
    cap = tensors["cap"].item() if "cap" in tensors else None
    return OutputHead(tensors["weight"], tensors.get("bias"), tensors["scale"].item(), cap, gaps=tensors.get("gaps"))


def fits(head: OutputHead, vocabulary: int, width: int) -> bool:
    """Whether a head is of that many tokens and of hidden states [N, width]."""
    return head.weight.shape == (vocabulary, width) and (head.bias is None or head.bias.shape == (vocabulary,))
