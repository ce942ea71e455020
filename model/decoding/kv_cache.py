"""Key/value caches of rows that are decoded together, each in a slot of its own, without padding.

All kinds have the same five operations; the slots in use are always the first ones:
- prefill(prompts): reads the prompts, each at its own length, into the next slots; hidden states [n, D] of their ends.
- step(tokens [n]): reads one token in each of the n slots in use; hidden states [n, D].
- move(source, target): the row of one slot takes another's place.
- drop(): the last slot is free.
- close(): nothing more is read.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from model.decoding.row_lengths import RowLengths
from model.gpt2.kv_cache import GPT2KVCache
from model.gpt2.packed_forward import can_pack
from model.language_model import LanguageModel, ModelError

# What a family's forward pass raises for masks and caches that it does not know.
FAMILY_ERRORS = (ModelError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)
# Keys of a config whose numbers are lengths beyond which a row is read in another way.
LIMITS = re.compile("window|local|chunk|original_max_position")
READ_AGAIN = ("phi3", "phimoe", "phi4_multimodal")
SHORT = 4  # tokens: a limit that every family is tried at


def make_kv_cache(language_model: LanguageModel, count: int, room: int):
    """`count` slots for rows of at most `room` tokens, of the quickest kind that is exact for the family."""
    if can_pack(language_model.model):
        return GPT2KVCache(language_model, count, room)
    together = decodes_together(language_model, SHORT) and fits_together(language_model, room)
    return (BatchKVCache if together else PerRowKVCaches)(language_model, count, room)


def fits_together(language_model: LanguageModel, room: int) -> bool:
    """Whether rows of up to `room` tokens may be decoded together: on both sides of every limit that the config names
    (the window of local attention, the length from which rope changes) a row does not depend on its neighbours."""
    limits = {limit for limit in limits_in(language_model.model.config.to_dict()) if SHORT <= limit < room}
    return can_pack(language_model.model) or all(decodes_together(language_model, limit) for limit in sorted(limits))


def limits_in(value, key: str = "") -> Iterator[int]:
    """The numbers of a config's limits, however deep they are."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from limits_in(child, str(name))
    elif isinstance(value, list):
        for child in value:
            yield from limits_in(child, key)
    elif type(value) is int and LIMITS.search(key):
        yield value


class BatchKVCache:
    """For any family whose cache is keys and values: the library's forward pass, with masks of our own."""

    def __init__(self, language_model: LanguageModel, count: int, room: int):
        self.language_model, self.count, self.room = language_model, count, room
        self.lengths = RowLengths(count, language_model.device)
        self.cache: Cache | None = None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        return torch.cat([self._prefill(prompt) for prompt in prompts])

    def _prefill(self, prompt: list[int]) -> Tensor:
        of_prompt = self.language_model.new_cache()
        hidden = self.language_model.last_hidden(
            torch.tensor([prompt], device=self.language_model.device), None, of_prompt
        )
        if self.cache is None:
            self.cache = Cache([BatchLayer(layer, self.count, self.room, self.lengths) for layer in of_prompt.layers])
        for layer, read in zip(self.cache.layers, of_prompt.layers, strict=True):
            layer.write(len(self.lengths.sizes), len(prompt), read)
        self.lengths.add([len(prompt)])
        return hidden

    def step(self, tokens: Tensor) -> Tensor:
        positions = self.lengths.places[:, None].clone()
        hidden = self.language_model.last_hidden(tokens[:, None], self._masks(), self.cache, positions)
        self.lengths.advance()
        return hidden

    def _masks(self):
        """One mask, or one for each type of layer where the family has several."""
        sliding, dtype = {layer.is_sliding for layer in self.cache.layers}, self.cache.layers[0].keys.dtype
        if sliding == {False}:
            return self.lengths.mask(dtype)
        windowed = self.lengths.mask(dtype, self.language_model.model.config.sliding_window)
        return windowed if sliding == {True} else {"full_attention": self.lengths.mask(dtype),
                                                   "sliding_attention": windowed}

    def move(self, source: int, target: int) -> None:
        for layer in self.cache.layers:
            layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]
        self.lengths.move(source, target)

    def drop(self) -> None:
        self.lengths.drop()

    def close(self) -> None:
        self.cache = None


class BatchLayer(DynamicLayer):
    """One layer's keys and values [slots, heads, room, head_dim], written in place at each row's own length."""

    def __init__(self, like: DynamicLayer, count: int, room: int, lengths: RowLengths):
        super().__init__()
        if type(like) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(f"a cache of {type(like).__name__} has no slots")
        # Zeros, because what is not written yet is multiplied by 0, and must be finite.
        self.keys, self.values = (each.new_zeros(count, each.shape[1], room, each.shape[3])
                                  for each in (like.keys, like.values))
        self.lengths, self.is_sliding, self.is_initialized = lengths, like.is_sliding, True

    def write(self, slot: int, length: int, read: DynamicLayer) -> None:
        """The keys and values of one prompt; of a sliding window the last ones are there."""
        start = length - read.keys.shape[2]
        self.keys[slot, :, start:length], self.values[slot, :, start:length] = read.keys[0], read.values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *unused, **also_unused) -> tuple[Tensor, Tensor]:
        count, places = len(key_states), self.lengths.places
        rows, longest = torch.arange(count, device=places.device), self.lengths.longest + 1
        self.keys[rows, :, places], self.values[rows, :, places] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:count, :, :longest], self.values[:count, :, :longest]

    def get_seq_length(self) -> int:
        return self.lengths.longest


class PerRowKVCaches:
    """For a family whose cache is something else: each row with the library's own, one after the other."""

    def __init__(self, language_model: LanguageModel, count: int, room: int):
        self.language_model = language_model
        self.rows: list[list[int]] = []
        self.caches: list[Cache] = []
        # Where Phi-3's rope changes its factors, what is cached no longer fits: `generate` reads such a row again too.
        config = language_model.model.config
        self.read_again_at = config.original_max_position_embeddings if config.model_type in READ_AGAIN else None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        start = len(self.caches)
        self.rows += [list(prompt) for prompt in prompts]
        self.caches += [self.language_model.new_cache() for _ in prompts]
        return self._read(prompts, self.caches[start:])

    def step(self, tokens: Tensor) -> Tensor:
        new = tokens[:, None].tolist()
        for slot, row in enumerate(self.rows):
            row += new[slot]
            if len(row) - 1 == self.read_again_at:
                new[slot], self.caches[slot] = row, self.language_model.new_cache()
        return self._read(new, self.caches)

    def _read(self, rows: list[list[int]], caches: list[Cache]) -> Tensor:
        device = self.language_model.device
        return torch.cat([self.language_model.last_hidden(torch.tensor([ids], device=device), None, cache)
                          for ids, cache in zip(rows, caches, strict=True)])

    def move(self, source: int, target: int) -> None:
        self.rows[target], self.caches[target] = self.rows[source], self.caches[source]

    def drop(self) -> None:
        self.rows.pop()
        self.caches.pop()

    def close(self) -> None:
        self.caches = []


def decodes_together(language_model: LanguageModel, limit: int) -> bool:
    """Whether `BatchKVCache` gives this family's own hidden states; tried once, with a row behind `limit` tokens, one
    that passes it, and a short one."""
    known = language_model.decodes_together
    if limit not in known:
        known[limit] = try_together(language_model, limit)
    return known[limit]


@torch.no_grad()
def try_together(language_model: LanguageModel, limit: int) -> bool:
    steps, device = 3, language_model.device
    most = language_model.context - steps
    lengths = [min(limit + 2, most), min(limit - 1, most), 2]
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(language_model.vocabulary, (length,), generator=draw).tolist() for length in lengths]
    tokens = torch.randint(language_model.vocabulary, (steps, len(prompts)), generator=draw).to(device)
    try:
        with torch.autocast(device.type, enabled=False):  # its rounding is larger than what is looked for
            alone, together = ([slots.prefill(prompts), *map(slots.step, tokens)] for slots in (
                kind(language_model, len(prompts), limit + 8) for kind in (PerRowKVCaches, BatchKVCache)))
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS:
        return False
    return all(torch.allclose(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))
               for one, other in zip(alone, together, strict=True))
