"""The one decoding loop: greedy decoding, evaluation and rollouts. Beam search is the library's.

Prompts are taken longest first. Each is read at its own length, all running rows advance together, a token at a time,
and a row that has finished makes room for a waiting prompt. The caller supplies the function that picks the next token.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from model.decoding.kv_cache import can_decode_together, make_kv_cache
from model.errors import ModelError
from model.language_model import LanguageModel, evaluating
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.transfer import to_device

Progress = Callable[[int, int], None]  # (rows finished, tokens generated) since the last call
# (prompt indices [n], positions of the next token in each continuation [n], hidden states [n, D] of each decoder)
# -> next tokens [n], on the device of the arguments
NextTokenFn = Callable[[Tensor, Tensor, list[Tensor]], Tensor]

CHECK_EVERY = 8  # tokens between two checks for finished rows on a GPU, since each check waits for it


class Decoder(NamedTuple):
    """A model that reads the tokens, and the head that turns its hidden states into logits, maybe on another device."""

    language_model: LanguageModel
    head: OutputHead

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] in float32 at least."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        states = to_device(hidden, self.head.weight.device, self.head.weight.dtype)
        return head_logits(states, self.head, precision, with_slope=False)[0]


def make_decoder(
    language_model: LanguageModel, head: OutputHead | None = None, vocabulary: int | None = None
) -> Decoder:
    """head: None = the model's own. vocabulary: number of tokens to choose from; None = the head's.

    Under autocast the head is cast to its type here, once.
    """
    head = language_model.output_head() if head is None else head
    return Decoder(language_model, cut_head(head, vocabulary, autocast_type(head.weight)))


@torch.inference_mode()
def greedy_decode(
    language_model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress = lambda rows, tokens: None,
) -> list[list[int]]:
    """Picks the most likely next token until one of the model's `end_ids` or `max_new_tokens`.

    prompts: token ids of any lengths. batch_size: rows decoded at a time. Returns the new ids of each prompt, in their
    order, without the end. In float32 they equal single-prompt `generate`, token for token, except that `unused_ids`
    are never chosen here.

    Raises:
        ModelError: an empty prompt, or prompt + max_new_tokens over the model's context.
    """
    check_prompts(language_model, prompts, max_new_tokens)
    end_ids = language_model.end_ids
    with evaluating(language_model):
        decoder = make_decoder(language_model)
        outputs = decode(
            [decoder], prompts, max_new_tokens, batch_size, end_ids,
            lambda rows, positions, hidden: decoder.logits(hidden[0]).argmax(-1), progress,
        )
    return [tokens[: length_to_end(tokens, end_ids)] for tokens in outputs]


def decode(
    decoders: list[Decoder],
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    end_ids: list[int],
    next_token_fn: NextTokenFn,
    progress: Progress = lambda rows, tokens: None,
    check_every: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, in their order: up to and including one of `end_ids`, or `max_new_tokens`.

    decoders: models in eval mode that all read the same tokens, each on its own device. batch_size: rows decoded at a
    time. next_token_fn: picks every row's next token. It may be called a few more times after a row's end, since
    finished rows are looked for every `check_every` tokens (None: 1 on a CPU, 8 on other devices); those tokens are
    ignored.
    """
    device = decoders[0].head.weight.device
    if check_every is None:
        check_every = 1 if device.type == "cpu" else CHECK_EVERY
    outputs: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1 or not prompts:
        return outputs
    waiting = deque(longest_first(prompts))
    max_length = len(prompts[waiting[0]]) + max_new_tokens
    running: list[int] = []  # the prompt's index of each row of the caches
    tokens = torch.empty(0, dtype=torch.int64, device=device)
    with ExitStack() as stack:
        caches = [
            stack.enter_context(closing(
                make_kv_cache(decoder.language_model, min(batch_size, len(prompts)), max_length)))
            for decoder in decoders
        ]
        while waiting or running:
            new = [waiting.popleft() for _ in range(min(batch_size - len(running), len(waiting)))]
            running = running + new
            lengths = [len(outputs[index]) for index in running]
            rows, positions = to_device(torch.tensor(running), device), to_device(torch.tensor(lengths), device)
            new_prompts = [prompts[index] for index in new]
            hidden = [read(cache, to_device(tokens, decoder.language_model.device), new_prompts)
                      for decoder, cache in zip(decoders, caches, strict=True)]
            steps = [next_token_fn(rows, positions, hidden)]
            for _ in range(min(check_every, max_new_tokens - max(lengths)) - 1):
                positions = positions + 1
                hidden = [cache.step(to_device(steps[-1], decoder.language_model.device))
                          for decoder, cache in zip(decoders, caches, strict=True)]
                steps.append(next_token_fn(rows, positions, hidden))
            finished, count = append_tokens(torch.stack(steps, 1).tolist(), running, outputs, end_ids, max_new_tokens)
            progress(len(finished), count)
            tokens = steps[-1][evict_finished(finished, running, caches, device)] if finished else steps[-1]
    return outputs


def read(cache, tokens: Tensor, prompts: list[list[int]]) -> Tensor:
    """Hidden states [n, D] of one more token of each running row, then of the ends of new prompts."""
    parts = [cache.step(tokens)] if len(tokens) else []
    parts += [cache.prefill(prompts)] if prompts else []
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def append_tokens(
    new: list[list[int]], running: list[int], outputs: list[list[int]], end_ids: list[int], max_new_tokens: int
) -> tuple[list[int], int]:
    """Appends each row's new tokens, up to its end. Returns (rows that have finished, number of tokens appended)."""
    finished, count = [], 0
    for row, (index, tokens) in enumerate(zip(running, new, strict=True)):
        tokens = tokens[: length_to_end(tokens, end_ids) + 1]
        outputs[index] += tokens
        count += len(tokens)
        if tokens[-1] in end_ids or len(outputs[index]) == max_new_tokens:
            finished.append(row)
    return finished, count


def length_to_end(tokens: list[int], end_ids: list[int]) -> int:
    """Number of tokens before the first end."""
    return next((index for index, token in enumerate(tokens) if token in end_ids), len(tokens))


def evict_finished(finished: list[int], running: list[int], caches: list, device: torch.device) -> Tensor:
    """Frees finished rows by moving the last rows there. Returns the previous index [n] of each row that stays."""
    previous = list(range(len(running)))
    for row in reversed(finished):
        last = len(running) - 1
        for cache in caches:
            if row != last:
                cache.move(last, row)
            cache.drop()
        running[row], previous[row] = running[last], previous[last]
        running.pop()
        previous.pop()
    return to_device(torch.tensor(previous, dtype=torch.int64), device)


@torch.inference_mode()
def beam_search(
    language_model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    num_beams: int,
    early_stopping: bool = False,
    batch_size: int = 8,
    progress: Progress = lambda rows, tokens: None,
) -> list[list[int]]:
    """The library's beam search, with the results and errors of `greedy_decode`."""
    check_prompts(language_model, prompts, max_new_tokens)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        early_stopping=early_stopping,
        do_sample=False,
        eos_token_id=language_model.end_ids,
        pad_token_id=language_model.tokenizer.pad_token_id,
        suppress_tokens=language_model.unused_ids or None,
    )
    results: list[list[int]] = [[] for _ in prompts]
    max_length = max(map(len, prompts), default=0) + max_new_tokens
    with evaluating(language_model):
        for rows in batches_by_length(prompts, batch_size if can_decode_together(language_model, max_length) else 1):
            input_ids, mask = left_padded([prompts[row] for row in rows], language_model)
            output = generate_plainly(language_model.model, input_ids, mask, settings)
            for row, new in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                results[row] = new[: length_to_end(new, language_model.end_ids)]
            progress(len(rows), sum(len(results[row]) for row in rows))
    return results


def generate_plainly(model, input_ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """`generate` with only these settings: the model's own defaults, such as penalties, would be merged in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(input_ids, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own


def check_prompts(language_model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    context = language_model.context
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ModelError(f"prompt {index} is empty: expected at least one token")
        if len(prompt) + max_new_tokens > context:
            raise ModelError(f"prompt {index} has {len(prompt)} tokens: with {max_new_tokens} new ones it exceeds the "
                             f"model's {context} tokens")


def longest_first(prompts: list[list[int]]) -> list[int]:
    """Indices of the prompts, the longest first, so that memory runs out at once or never."""
    return sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))


def batches_by_length(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches, the longest prompts first."""
    order = longest_first(prompts)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_padded(prompts: list[list[int]], language_model: LanguageModel) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T] on the model's device."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = pad(rows, padding_value=language_model.tokenizer.pad_token_id)
    mask = pad([torch.ones_like(row) for row in rows])
    return ids.to(language_model.device), mask.to(language_model.device)
