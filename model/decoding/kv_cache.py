"""Key/value caches of rows that are decoded together, without padding: each row has its own length.

All caches have the same operations; the rows in use are always the first ones:
- prefill(prompts): reads prompts, each at its own length, into the next free rows; hidden states [n, D] of their ends.
- step(tokens [n]): reads one token in each of the n rows in use; hidden states [n, D].
- move(source, target): copies one row over another.
- drop(): frees the last row.
- close(): releases memory; nothing is read afterwards.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from model.decoding.row_lengths import RowLengths
from model.errors import ModelError
from model.gpt2.kv_cache import GPT2KVCache
from model.gpt2.packed_forward import can_pack
from model.language_model import LanguageModel

# Config keys whose numbers are lengths from which on a row is read in another way.
LIMIT_KEYS = re.compile("window|local|chunk|original_max_position")
SHORT_LIMIT = 4  # tokens: a limit that every family is tried at
# Phi-3's rope changes its factors at this length, so that cached keys no longer fit: `generate` reads such a row again.
REREAD_FAMILIES = ("phi3", "phimoe", "phi4_multimodal")


def make_kv_cache(language_model: LanguageModel, batch_size: int, max_length: int):
    """A cache for `batch_size` rows of up to `max_length` tokens, of the fastest type that is exact for the family."""
    if can_pack(language_model.model):
        return GPT2KVCache(language_model, batch_size, max_length)
    if batch_decoding_is_exact(language_model, SHORT_LIMIT) and can_decode_together(language_model, max_length):
        return BatchKVCache(language_model, batch_size, max_length)
    return PerRowKVCaches(language_model, batch_size, max_length)


class BatchKVCache:
    """For any family whose cache is keys and values: the library's forward pass with our own masks."""

    def __init__(self, language_model: LanguageModel, batch_size: int, max_length: int):
        self.language_model, self.batch_size, self.max_length = language_model, batch_size, max_length
        self.rows = RowLengths(batch_size, language_model.device)
        self.cache: Cache | None = None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        return torch.cat([self._prefill(prompt) for prompt in prompts])

    def _prefill(self, prompt: list[int]) -> Tensor:
        prompt_cache, device = self.language_model.new_cache(), self.language_model.device
        hidden = self.language_model.last_hidden(torch.tensor([prompt], device=device), prompt_cache)
        if self.cache is None:
            self.cache = Cache([BatchLayer(layer, self.batch_size, self.max_length, self.rows)
                                for layer in prompt_cache.layers])
        for layer, prompt_layer in zip(self.cache.layers, prompt_cache.layers, strict=True):
            layer.write(len(self.rows.lengths), len(prompt), prompt_layer)
        self.rows.add([len(prompt)])
        return hidden

    def step(self, tokens: Tensor) -> Tensor:
        hidden = self.language_model.last_hidden(tokens[:, None], self.cache, attention_mask=self._masks(),
                                                 position_ids=self.rows.positions[:, None].clone())
        self.rows.advance()
        return hidden

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """One mask, or one for each type of layer if the family has several."""
        sliding, dtype = {layer.is_sliding for layer in self.cache.layers}, self.cache.layers[0].keys.dtype
        if sliding == {False}:
            return self.rows.mask(dtype)
        windowed = self.rows.mask(dtype, self.language_model.model.config.sliding_window)
        if sliding == {True}:
            return windowed
        return {"full_attention": self.rows.mask(dtype), "sliding_attention": windowed}

    def move(self, source: int, target: int) -> None:
        for layer in self.cache.layers:
            layer.keys[target], layer.values[target] = layer.keys[source], layer.values[source]
        self.rows.move(source, target)

    def drop(self) -> None:
        self.rows.drop()

    def close(self) -> None:
        self.cache = None


class BatchLayer(DynamicLayer):
    """One layer's keys and values [batch_size, heads, max_length, head_dim], written at each row's own length."""

    def __init__(self, like: DynamicLayer, batch_size: int, max_length: int, rows: RowLengths):
        super().__init__()
        if type(like) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(f"a cache of {type(like).__name__} cannot hold rows of different lengths")
        # Zeros, because entries that are not written yet are multiplied by 0 and must be finite.
        self.keys, self.values = (tensor.new_zeros(batch_size, tensor.shape[1], max_length, tensor.shape[3])
                                  for tensor in (like.keys, like.values))
        self.rows, self.is_sliding, self.is_initialized = rows, like.is_sliding, True

    def write(self, row: int, length: int, prompt_layer: DynamicLayer) -> None:
        """Store one prompt's keys and values; a sliding window holds only its last ones."""
        start = length - prompt_layer.keys.shape[2]
        self.keys[row, :, start:length] = prompt_layer.keys[0]
        self.values[row, :, start:length] = prompt_layer.values[0]

    def update(self, key_states: Tensor, value_states: Tensor, *unused, **also_unused) -> tuple[Tensor, Tensor]:
        count, positions = len(key_states), self.rows.positions
        rows, end = torch.arange(count, device=positions.device), self.rows.longest + 1
        self.keys[rows, :, positions], self.values[rows, :, positions] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:count, :, :end], self.values[:count, :, :end]

    def get_seq_length(self) -> int:
        return self.rows.longest


class PerRowKVCaches:
    """For a family whose cache is something else: every row has the library's own and is read alone."""

    def __init__(self, language_model: LanguageModel, batch_size: int, max_length: int):
        self.language_model = language_model
        self.rows: list[list[int]] = []
        self.caches: list[Cache] = []
        config = language_model.model.config
        self.reread_at = config.original_max_position_embeddings if config.model_type in REREAD_FAMILIES else None

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        start = len(self.caches)
        self.rows += [list(prompt) for prompt in prompts]
        self.caches += [self.language_model.new_cache() for _ in prompts]
        return self._read(prompts, self.caches[start:])

    def step(self, tokens: Tensor) -> Tensor:
        new = tokens[:, None].tolist()
        for index, row in enumerate(self.rows):
            row += new[index]
            if len(row) - 1 == self.reread_at:
                new[index], self.caches[index] = row, self.language_model.new_cache()
        return self._read(new, self.caches)

    def _read(self, rows: list[list[int]], caches: list[Cache]) -> Tensor:
        device = self.language_model.device
        return torch.cat([self.language_model.last_hidden(torch.tensor([ids], device=device), cache)
                          for ids, cache in zip(rows, caches, strict=True)])

    def move(self, source: int, target: int) -> None:
        self.rows[target], self.caches[target] = self.rows[source], self.caches[source]

    def drop(self) -> None:
        self.rows.pop()
        self.caches.pop()

    def close(self) -> None:
        self.caches = []


# -- whether a family's rows may be decoded together ----------------------------------------------------------------


def can_decode_together(language_model: LanguageModel, max_length: int) -> bool:
    """Whether a row of up to `max_length` tokens is independent of the rows it is decoded with.

    Tried on both sides of every limit that the config names: the window of local attention, the length from which on
    rope changes.
    """
    if can_pack(language_model.model):
        return True
    limits = {limit for limit in limits_in(language_model.model.config.to_dict()) if SHORT_LIMIT <= limit < max_length}
    return all(batch_decoding_is_exact(language_model, limit) for limit in sorted(limits))


def limits_in(value, key: str = "") -> Iterator[int]:
    """The lengths that a config names under LIMIT_KEYS, at any depth."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from limits_in(child, str(name))
    elif isinstance(value, list):
        for child in value:
            yield from limits_in(child, key)
    elif type(value) is int and LIMIT_KEYS.search(key):
        yield value


@torch.no_grad()
def batch_decoding_is_exact(language_model: LanguageModel, limit: int) -> bool:
    """Whether `BatchKVCache` gives this family's own hidden states; tried once, with a row longer than `limit` tokens,
    one that passes it while it is decoded, and a short one."""
    known = language_model.batch_decoding_is_exact
    if limit in known:
        return known[limit]
    steps, device = 3, language_model.device
    longest = language_model.context - steps
    lengths = [min(limit + 2, longest), min(limit - 1, longest), 2]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(language_model.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    tokens = torch.randint(language_model.vocabulary, (steps, len(prompts)), generator=generator).to(device)
    try:
        with torch.autocast(device.type, enabled=False):  # its rounding is larger than the differences to be found
            alone, together = ([cache.prefill(prompts), *map(cache.step, tokens)] for cache in (
                cache_type(language_model, len(prompts), limit + 8) for cache_type in (PerRowKVCaches, BatchKVCache)))
        known[limit] = all(torch.allclose(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))
                           for one, other in zip(alone, together, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward pass may raise anything for masks and caches that it does not know
        known[limit] = False
    return known[limit]
