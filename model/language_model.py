"""`LanguageModel`: a causal LM of `transformers` with its tokenizer, and the operations the rest is made of."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from model.gpt2.packed_forward import can_pack, packed_hidden_states, plan_packing
from model.gpt2.tied_weight import tied
from model.losses.output_head import OutputHead
from model.transfer import to_device

IGNORED = -100  # label of a position that takes no loss


class ModelError(ValueError):
    """A model that cannot be had or used as asked: one line for the user."""

    exit_code = 2


class LabelPositions(NamedTuple):
    """index [N] int64: hidden states, flattened to [B * T, D], that predict a label; targets [N] int64: the labels."""

    index: Tensor
    targets: Tensor


def label_positions(labels: Tensor) -> LabelPositions:
    """Which hidden states predict which label; the one place where the shift by one lives.

    labels [B, T] int64, -100 where no loss is taken. The hidden state at t predicts labels[:, t + 1], so labels[:, 0]
    is never predicted. Both results lie on the device of `labels`, in row order.
    """
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return LabelPositions(rows * labels.shape[1] + columns, labels[rows, columns + 1])


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] of the attended tokens, counted from 0 at each row's first one, wherever the padding is."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


class LanguageModel(nn.Module):
    """A decoder-only LM whose logits are head(hidden states), with its tokenizer.

    model: `PreTrainedModel` with float32 weights. tokenizer: a fast tokenizer. Where it has no pad token,
    end-of-text pads: the vocabulary never grows (padding is told by the mask, never by its id).
    vocabulary: attribute, the largest id of a real token + 1. unused_ids: attribute, the other rows of the embedding:
    padding of the matrix, gaps between ids, a pad token added behind all others. They are never generated.
    end_ids: attribute, the ids that end a generated text: the tokenizer's end-of-text, then those that the
    generation_config of the model's folder lists.
    pack_rows, prune_last_block: attributes, for debugging: False computes padding, and the last block everywhere, in
    `label_hidden` too.

    Raises:
        ModelError: the tokenizer is slow, has no end-of-text, or has more tokens than the embedding has rows.
    """

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        check_tokenizer(model, tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model = model
        self.tokenizer = tokenizer
        accepted = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self.cache_argument = "cache" if "cache" in accepted else "past_key_values"
        self._logit_scale, self._logit_cap = logit_transform(model)
        self.pack_rows = self.prune_last_block = True
        self._compiled = False
        self.decodes_together: dict[int, bool] = {}  # by length, found out by model/decoding/kv_cache.py
        real = real_tokens(tokenizer)
        if self.prompt_template is not None:  # our own folder says what its loss left out
            left_out = {*(model.generation_config.suppress_tokens or ())}
            real = {index: token for index, token in real.items() if index not in left_out}
        self.vocabulary = max(real) + 1
        self.unused_ids = [row for row in range(embedding_rows(model)) if row not in real]
        gaps = [row for row in self.unused_ids if row < self.vocabulary]
        self.register_buffer("_gaps", torch.tensor(gaps) if gaps else None, persistent=False)
        self.end_ids = [tokenizer.eos_token_id, *other_ends(model, tokenizer, real)]

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int:
        """The most tokens that fit: positions of the model, else what the tokenizer says, else 1024."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(value := getattr(self.model.config, name, None), int) and value > 0:
                return value
        said = self.tokenizer.model_max_length
        return said if said < 10**9 else 1024

    @property
    def end_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prompt_template(self) -> str | None:
        """Template of the prompts this model was trained on; travels with its weights in config.json.

        Raises:
            ModelError: the config.json has something else there.
        """
        template = getattr(self.model.config, "prompt_template", None)
        if not isinstance(template, str | None):
            raise ModelError(f"prompt_template in the model's config.json is {template!r}: expected text")
        return template

    @property
    def prompt_max_length(self) -> int | None:
        """`max_length` of the rows this model was trained on, or None.

        Raises:
            ModelError: the config.json has something else there.
        """
        length = getattr(self.model.config, "prompt_max_length", None)
        if length is not None and not (type(length) is int and length > 0):
            raise ModelError(f"prompt_max_length in the model's config.json is {length!r}: expected a number of tokens")
        return length

    @property
    def max_new_tokens(self) -> int | None:
        """The length of a generated text that the model's folder records, or None."""
        recorded = self.model.generation_config.max_new_tokens
        return recorded if type(recorded) is int and recorded > 0 else None

    def record_training(self, prompt_template: str, prompt_max_length: int, max_new_tokens: int | None = None) -> None:
        """Keep with the weights what a later user needs to prompt the model and decode as in training."""
        self.model.config.prompt_template = prompt_template
        self.model.config.prompt_max_length = prompt_max_length
        self.model.generation_config.max_new_tokens = max_new_tokens

    def parameter_count(self) -> int:
        """Number of parameters, a head tied to the embedding counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # -- operations ----------------------------------------------------------------------------------------------

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D], ready for `lm_head`.

        input_ids [B, T] on the model's device; attention_mask [B, T] (1 = token, 0 = padding) there or on the CPU.
        With padding on the right causal attention needs no mask: a token never sees what follows it. A mask on the
        CPU is looked at, so that right padding runs without one; for one on another device, looking would mean
        waiting. Padding on the left gets its mask and positions that start at each row's first token.
        """
        arguments = {}
        if attention_mask is not None and not is_right_padded(attention_mask):
            attention_mask = to_device(attention_mask, input_ids.device)
            arguments["attention_mask"] = attention_mask
            if self._takes_positions:
                arguments["position_ids"] = position_ids(attention_mask)
        return self.model.base_model(input_ids=input_ids, use_cache=False, **arguments)[0]

    def label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, lookup: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(hidden states [N, D] that predict a label, the labels [N]), in row order, on the model's device.

        Arguments [B, T] as for `hidden_states` and `label_positions`; on the CPU nothing here waits for the device.
        Where the family allows it (GPT-2, padding on the right) no padding is computed, nothing behind a row's last
        label, and in the last block only keys and values of the positions that predict nothing.

        lookup: of `head_and_lookup`, where the hidden states go through that head.
        """
        index, targets = label_positions(labels)
        targets, input_ids = (to_device(each, self.device) for each in (targets, input_ids))
        padded_left = attention_mask is not None and not is_right_padded(attention_mask.cpu())
        switched_off = not (self.pack_rows or self.prune_last_block)
        if padded_left or switched_off or not len(index) or not can_pack(self.model):
            hidden = self.hidden_states(input_ids, attention_mask).flatten(0, 1)
            return hidden[to_device(index, self.device)], targets
        packing = plan_packing(index.cpu(), tuple(labels.shape), self.pack_rows, self.device)
        hidden = packed_hidden_states(
            self.model.base_model, input_ids, packing, self.prune_last_block, lookup=lookup, compiled=self._compiled
        )
        return hidden, targets

    def compile_forward(self) -> None:
        """Compile the forward pass of training: what lies between attentions where rows are packed, else the library's
        own. It takes a minute or so at the first step, and again for each new kind of step."""
        if can_pack(self.model) and (self.pack_rows or self.prune_last_block):
            self._compiled = True
        else:
            self.model.base_model.compile(dynamic=True)

    def output_head(self) -> OutputHead:
        """The head as tensors, for `vocabulary_loss`: the same logits as `lm_head`, but for `unused_ids`."""
        head = self.model.get_output_embeddings()
        return OutputHead(head.weight, head.bias, self._logit_scale, self._logit_cap, self.vocabulary, self._gaps)

    def head_and_lookup(self) -> tuple[OutputHead, Tensor | None]:
        """(`output_head`, what `label_hidden` looks tokens up in) for a training step.

        Where they are one weight, its gradient is then formed in the place of the head's, without a second tensor of
        that size. None: the embedding as it is.
        """
        head, embedding = self.output_head(), self.model.get_input_embeddings().weight
        if head.weight is not embedding or not embedding.requires_grad or not can_pack(self.model):
            return head, None
        lookup, weight = tied(embedding)
        return head._replace(weight=weight), lookup

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], with the family's scaling or cap of logits."""
        logits = self.model.get_output_embeddings()(hidden)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._logit_cap is not None:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits

    def new_cache(self) -> DynamicCache:
        """An empty cache for `last_hidden`."""
        return DynamicCache(config=self.model.config)

    def last_hidden(self, input_ids: Tensor, attention_mask, cache, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, D] of the last of new tokens [B, S] that continue `cache` (a `transformers` Cache).

        attention_mask [B, past + S] on the model's device, or None where no row is padded; or, with the new tokens'
        positions [B, S], a mask of every key ([B, 1, S, keys], or one for each type of layer). `cache` grows by S.
        """
        arguments = {self.cache_argument: cache}
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
            if positions is None and self._takes_positions:
                positions = position_ids(attention_mask)[:, -input_ids.shape[1] :]
        if positions is not None:
            arguments["position_ids"] = positions
        return self.model.base_model(input_ids=input_ids, use_cache=True, **arguments)[0][:, -1]

    @torch.no_grad()
    def check_family(self) -> None:
        """Compare with the model's own logits once: this wrapper must be exact or refuse.

        Raises:
            ModelError: the family's logits are not head(hidden states), or padding on the left or a key/value cache
                changes them; or weights or logits are not finite.
        """
        check_finite_weights(self.model)
        ids = torch.arange(6, device=self.device)[None] % self.model.get_input_embeddings().weight.shape[0]
        padded = torch.cat([ids[:, :1].expand(1, 3), ids], dim=1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]], device=self.device)
        with evaluating(self):
            try:
                own = self.model(input_ids=ids, use_cache=False).logits[0].float()
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
                reason = " ".join(str(error).split())[:150]
                raise ModelError(f"{type(self.model).__name__}: its config.json describes what cannot be computed "
                                 f"({reason}): take another checkpoint") from error
            if not own.isfinite().all():
                raise ModelError(f"{type(self.model).__name__}: its weights are finite but its outputs are not: take "
                                 "another checkpoint, or set precision to float32")
            labels = torch.cat([ids[:, :1] * 0 + IGNORED, ids[:, 1:]], dim=1)
            cases = (
                ("are not head(hidden states)", lambda: self.hidden_states(ids)[0], own),
                ("change with padding on the left", lambda: self.hidden_states(padded, mask)[0, 3:], own),
                ("change at label positions", lambda: self.label_hidden(ids, None, labels)[0], own[:-1]),
                ("change with a key/value cache", lambda: self._last_hidden_in_steps(padded, mask), own[-1:]),
            )
            for fault, hidden, expected in cases:
                check_equal_logits(f"{type(self.model).__name__}: its logits {fault}", self.lm_head, hidden, expected)

    def _last_hidden_in_steps(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, D] of the last token, the last two read one by one through a cache."""
        cache = self.new_cache()
        length = input_ids.shape[1]
        for start, stop in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
            hidden = self.last_hidden(input_ids[:, start:stop], attention_mask[:, :stop], cache)
        return hidden

    def leave_out_ids_from(self, vocabulary: int) -> None:
        """Only ids below `vocabulary` are real from now on."""
        self.vocabulary = min(vocabulary, self.vocabulary)
        self.unused_ids = sorted({*self.unused_ids, *range(self.vocabulary, embedding_rows(self.model))})

    def remove_unused_rows(self) -> int:
        """Cut embedding and head behind the tokenizer's largest id; the number of rows removed. Before training: an
        optimizer's state is of the rows that were there."""
        rows = token_rows(self.tokenizer)
        removed = embedding_rows(self.model) - rows
        if removed > 0:
            self.model.resize_token_embeddings(rows)
            config = self.model.config.get_text_config()
            if (getattr(config, "pad_token_id", None) or 0) >= rows:  # no embedding could be made for it
                config.pad_token_id = None
            self.unused_ids = [row for row in self.unused_ids if row < rows]
        return removed

    def save(self, folder: Path) -> None:
        """Write a standard folder that `AutoModelForCausalLM` and `AutoTokenizer` load with the library alone.

        The library's `generate` then decodes as `greedy_decode` does: settings such as penalties, with which the model
        came, are not kept.
        """
        config, ends = self.model.config, self.end_ids
        config.eos_token_id = ends[0]
        if getattr(config, "task_specific_params", None):  # those of gpt2 on the hub make a pipeline sample
            config.task_specific_params = None
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends if len(ends) > 1 else ends[0],
            pad_token_id=self.tokenizer.pad_token_id,  # not in config.json: Llama's embedding has no gradient there
            bos_token_id=self.tokenizer.bos_token_id,
            suppress_tokens=self.unused_ids or None,
        )
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def is_right_padded(attention_mask: Tensor) -> bool:
    """Whether a mask on the CPU is 1...1 0...0 in each row. False for a mask on another device."""
    if attention_mask.device.type != "cpu":
        return False
    return bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all())


def check_equal_logits(fault: str, lm_head, hidden, expected: Tensor) -> None:
    """Raises ModelError (`fault`) where lm_head(hidden()) is not `expected` [N, V], or cannot be had."""
    reason = None
    try:
        logits = lm_head(hidden()).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        reason = error
    else:
        tolerance = 1e-3 * expected.abs().max()
        if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance:
            return
    raise ModelError(f"{fault}: this family is not supported; GPT-2, Llama, Qwen2, GPT-NeoX are") from reason


def check_finite_weights(model: nn.Module) -> None:
    """Raises ModelError that names the first weight with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        bad = ~parameter.isfinite()
        if count := int(bad.sum()):
            rows = bad.reshape(len(bad), -1).any(1).nonzero()[:, 0].tolist() if bad.dim() else [0]
            told = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            place = getattr(model, "name_or_path", "") or type(model).__name__
            raise ModelError(f"{place}: its weights are not finite, {count} of {bad.numel()} values of {name} (rows "
                             f"{told}): take another checkpoint, or train it again with a lower learning rate")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in eval mode; afterwards each of its parts has its former mode back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_tokenizer(model: nn.Module, tokenizer) -> None:
    """Raises ModelError where the tokenizer cannot serve the model."""
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} has no fast version (tokenizer.json): choose another tokenizer")
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token (eos_token): the end of a summary could not be learnt")
    rows, tokens = embedding_rows(model), token_rows(tokenizer)
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens but the model's embedding only {rows} rows: "
            "give the model's own tokenizer (model_arch.tokenizer), or train that size with from_scratch"
        )


def embedding_rows(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[0]


def token_rows(tokenizer) -> int:
    """Rows that an embedding needs: the largest id + 1, since ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=0)


def real_tokens(tokenizer) -> dict[int, str]:
    """Token of each id, without a pad token that was added behind all others."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    last = max(tokens)
    if last == tokenizer.pad_token_id and last != tokenizer.eos_token_id and last in tokenizer.added_tokens_decoder:
        del tokens[last]
    return tokens


def other_ends(model: nn.Module, tokenizer, real: dict[int, str]) -> list[int]:
    """The ends of text that the model's generation_config lists beside the tokenizer's."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return [end for end in dict.fromkeys(listed) if end in real and end != tokenizer.eos_token_id]


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """(factor, cap) that the family applies to its head's output: logits = cap * tanh(factor * head(hidden) / cap)."""
    config = model.config
    scale = 1.0
    if isinstance(factor := getattr(config, "logit_scale", None), (int, float)):  # Cohere
        scale *= factor
    if isinstance(divisor := getattr(config, "logits_scaling", None), (int, float)):  # Granite
        scale /= divisor
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return scale, cap
