"""The one decoding loop: greedy decoding, evaluation and rollouts. Beam search through the library.

Prompts are taken longest first, each is read at its own length into a slot, and all slots go on together, a token at a
time; a row that has ended makes room for a waiting prompt. What the next token is, the caller chooses.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.decoding.kv_cache import fits_together, make_kv_cache
from model.language_model import LanguageModel, ModelError, evaluating
from model.losses.output_head import OutputHead, autocast_type, cut_head, head_logits
from model.transfer import to_device

Progress = Callable[[int, int], None]  # (rows finished, tokens generated) since the last call
# (row numbers [n], places of the next token in each row's continuation [n], hidden states [n, D] of each voice)
# -> the next tokens [n], on the device of the rows
Choose = Callable[[Tensor, Tensor, list[Tensor]], Tensor]

LOOK_EVERY = 8  # tokens between two looks at what has ended, on a device that would have to be waited for


class Voice(NamedTuple):
    """A model that reads along, and the head that turns its hidden states into logits, perhaps on another device."""

    language_model: LanguageModel
    head: OutputHead

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] in float32 at least."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        states = to_device(hidden, self.head.weight.device, self.head.weight.dtype)
        return head_logits(states, self.head, precision, with_slope=False)[0]


def make_voice(language_model: LanguageModel, head: OutputHead | None = None, vocabulary: int | None = None) -> Voice:
    """head: None = the model's own. vocabulary: number of tokens to choose from; None = what the head says.

    Under autocast the head is cast to its type here, once.
    """
    head = language_model.output_head() if head is None else head
    head = cut_head(head, vocabulary)
    bias = None if head.bias is None else head.bias.detach()
    return Voice(language_model, head._replace(weight=head.weight.detach().to(autocast_type(head.weight)), bias=bias))


@torch.inference_mode()
def greedy_decode(
    language_model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress = lambda rows, tokens: None,
) -> list[list[int]]:
    """The most likely next token again and again, until one of the model's `end_ids` or `max_new_tokens`.

    prompts: token ids of any lengths. batch_size: rows decoded at a time. Returns the new ids of each prompt, in their
    order, without the end. In float32 they equal single-prompt `generate`, token for token, but for `unused_ids`, which
    are never chosen here.

    Raises:
        ModelError: an empty prompt, or prompt + max_new_tokens over the model's context.
    """
    check_prompts(language_model, prompts, max_new_tokens)
    ends = language_model.end_ids
    with evaluating(language_model):
        voice = make_voice(language_model)
        made = decode(
            [voice], prompts, max_new_tokens, batch_size, ends,
            lambda rows, places, hidden: voice.logits(hidden[0]).argmax(-1), progress,
        )
    return [tokens[: length_to_end(tokens, ends)] for tokens in made]


def decode(
    voices: list[Voice],
    prompts: list[list[int]],
    max_new_tokens: int,
    slots: int,
    end_ids: list[int],
    choose: Choose,
    progress: Progress = lambda rows, tokens: None,
    look_every: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, in their order: up to and including one of `end_ids`, or `max_new_tokens`.

    voices: models in eval mode that all read the same tokens, each on its own device. slots: rows decoded at a time.
    choose: is asked for every row's next token. It may be asked a few more times after a row's end (the loop looks for
    ends every `look_every` tokens; None is 1 on a CPU and 8 on other devices): what it did there is to be ignored.
    """
    device = voices[0].head.weight.device
    if look_every is None:
        look_every = 1 if device.type == "cpu" else LOOK_EVERY
    made: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1 or not prompts:
        return made
    waiting = deque(longest_first(prompts))
    room = len(prompts[waiting[0]]) + max_new_tokens
    live: list[int] = []  # the row in each slot
    tokens = torch.empty(0, dtype=torch.int64, device=device)
    with ExitStack() as opened:
        caches = [opened.enter_context(closing(make_kv_cache(voice.language_model, min(slots, len(prompts)), room)))
                  for voice in voices]
        while waiting or live:
            fresh = [waiting.popleft() for _ in range(min(slots - len(live), len(waiting)))]
            new, live = [prompts[row] for row in fresh], live + fresh
            done = [len(made[row]) for row in live]
            rows, places = (to_device(torch.tensor(each), device) for each in (live, done))
            hidden = [read(cache, to_device(tokens, voice.language_model.device), new)
                      for voice, cache in zip(voices, caches, strict=True)]
            chosen = [choose(rows, places, hidden)]
            for _ in range(min(look_every, max_new_tokens - max(done)) - 1):
                places = places + 1
                hidden = [cache.step(to_device(chosen[-1], voice.language_model.device))
                          for voice, cache in zip(voices, caches, strict=True)]
                chosen.append(choose(rows, places, hidden))
            ended, count = note(torch.stack(chosen, 1).tolist(), live, made, end_ids, max_new_tokens)
            progress(len(ended), count)
            tokens = chosen[-1][leave(ended, live, caches, device)] if ended else chosen[-1]
    return made


def read(cache, tokens: Tensor, prompts: list[list[int]]) -> Tensor:
    """Hidden states [n, D]: of the rows that go on with one token each, then of the ends of new prompts."""
    parts = [cache.step(tokens)] if len(tokens) else []
    parts += [cache.prefill(prompts)] if prompts else []
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def note(chosen: list[list[int]], live: list[int], made: list[list[int]], end_ids: list[int], most: int):
    """Adds each slot's new tokens to its row, up to its end. (slots that have ended, number of tokens added)."""
    ended, count = [], 0
    for slot, (row, new) in enumerate(zip(live, chosen, strict=True)):
        new = new[: length_to_end(new, end_ids) + 1]
        made[row] += new
        count += len(new)
        if new[-1] in end_ids or len(made[row]) == most:
            ended.append(slot)
    return ended, count


def length_to_end(tokens: list[int], end_ids: list[int]) -> int:
    """Number of tokens before the first end."""
    return next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))


def leave(ended: list[int], live: list[int], caches: list, device: torch.device) -> Tensor:
    """Frees slots; the last rows take the places of those that have ended. Former slots [n] of the rows that stay."""
    former = list(range(len(live)))
    for slot in reversed(ended):
        last = len(live) - 1
        for cache in caches:
            if slot != last:
                cache.move(last, slot)
            cache.drop()
        live[slot], former[slot] = live[last], former[last]
        live.pop()
        former.pop()
    return to_device(torch.tensor(former, dtype=torch.int64), device)


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
    longest = max(map(len, prompts), default=0) + max_new_tokens
    with evaluating(language_model):
        size = batch_size if fits_together(language_model, longest) else 1
        for rows in batches_by_length(prompts, size):
            input_ids, mask = left_padded([prompts[row] for row in rows], language_model)
            mask = torch.ones_like(input_ids) if mask is None else mask
            output = generate_plainly(language_model.model, input_ids, mask, settings)
            for row, new in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                results[row] = new[: length_to_end(new, language_model.end_ids)]
            progress(len(rows), sum(len(results[row]) for row in rows))
    return results


def generate_plainly(model, input_ids: Tensor, mask: Tensor, settings: GenerationConfig) -> Tensor:
    """`generate` with these settings alone: a model's own defaults (penalties and the like) would be mixed in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return model.generate(input_ids, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own


def check_prompts(language_model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    context = language_model.context
    if max_new_tokens >= context:
        raise ModelError(f"max_generation_length is {max_new_tokens}: expected less than the model's {context} tokens")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ModelError(f"prompt {number} is empty: expected at least one token")
        if len(prompt) + max_new_tokens > context:
            raise ModelError(
                f"prompt {number} has {len(prompt)} tokens: with {max_new_tokens} new ones it exceeds the model's "
                f"{context} tokens"
            )


def longest_first(prompts: list[list[int]]) -> list[int]:
    """Row numbers, the longest prompts first, so that memory runs out at once or never."""
    return sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))


def batches_by_length(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches, the longest prompts first."""
    order = longest_first(prompts)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def left_padded(prompts: list[list[int]], language_model: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """input_ids [B, T] and attention_mask [B, T] on the model's device; no mask where all lengths are equal."""
    longest = max(map(len, prompts))
    pad = language_model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    if all(len(prompt) == longest for prompt in prompts):
        return ids.to(language_model.device), None
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(language_model.device), mask.to(language_model.device)
