"""Greedy decoding in batches with a KV cache; beam search through the library."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.language_model import LanguageModel, ModelError, evaluating

Progress = Callable[[int, int], None]  # (rows finished, tokens generated) since the last call


@torch.inference_mode()
def greedy_decode(
    language_model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    progress: Progress = lambda rows, tokens: None,
) -> list[list[int]]:
    """The most likely next token again and again, until end-of-text or `max_new_tokens`.

    prompts: token ids of any lengths. Returns the new ids of each prompt, in their order, without the end-of-text.
    In float32 they equal single-prompt `generate`, token for token. Prompts are batched by length with padding on the
    left; rows that end leave the batch.

    Raises:
        ModelError: an empty prompt, or prompt + max_new_tokens over the model's context.
    """
    check_prompts(language_model, prompts, max_new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    with evaluating(language_model):
        for rows in batches_by_length(prompts, batch_size):
            decode_batch(language_model, rows, prompts, max_new_tokens, results, progress)
    return results


def decode_batch(language_model, rows, prompts, max_new_tokens, results, progress) -> None:
    """Decode the prompts numbered `rows` together and write their new ids to `results`."""
    input_ids, mask = left_padded([prompts[row] for row in rows], language_model)
    cache = language_model.new_cache()
    live = list(rows)
    for step in range(max_new_tokens):
        logits = language_model.lm_head(language_model.last_hidden(input_ids, mask, cache))
        input_ids = logits.float().argmax(-1, keepdim=True)
        ended = []
        for index, token in enumerate(input_ids[:, 0].tolist()):
            if live[index] is None:
                continue
            if token == language_model.end_id:
                ended.append(index)
            else:
                results[live[index]].append(token)
        progress(len(ended), len(live) - live.count(None))
        for index in ended:
            live[index] = None
        going = [index for index, row in enumerate(live) if row is not None]
        if not going or step + 1 == max_new_tokens:
            progress(len(going), 0)
            return
        # A row that has ended goes on unseen until a quarter of the batch has: dropping rows copies the whole cache.
        if len(going) <= 0.75 * len(live):
            keep = torch.tensor(going, device=input_ids.device)
            cache.batch_select_indices(keep)
            input_ids, live = input_ids[keep], [live[index] for index in going]
            mask = None if mask is None else mask[keep]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


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
        eos_token_id=language_model.end_id,
        pad_token_id=language_model.tokenizer.pad_token_id,
    )
    results: list[list[int]] = [[] for _ in prompts]
    with evaluating(language_model):
        for rows in batches_by_length(prompts, batch_size):
            input_ids, mask = left_padded([prompts[row] for row in rows], language_model)
            mask = torch.ones_like(input_ids) if mask is None else mask
            output = generate_plainly(language_model.model, input_ids, mask, settings)
            for row, new in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = new.index(language_model.end_id) if language_model.end_id in new else len(new)
                results[row] = new[:end]
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


def batches_by_length(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers, the longest prompts first, so that memory runs out at once or never."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
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
