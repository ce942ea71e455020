"""`LanguageModel`: a causal LM of `transformers` with its tokenizer, and the operations that all else is built from."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from model.gpt2.packed_forward import can_pack, packed_hidden_states, plan_packing
from model.gpt2.tied_weight import tied
from model.label_shift import label_positions
from model.losses.output_head import OutputHead
from model.transfer import to_device
from model.vocabulary import all_end_ids, check_tokenizer, embedding_rows, real_tokens, token_rows


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, T] of the attended tokens, counted from 0 at each row's first one, wherever the padding is."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


class LanguageModel(nn.Module):
    """A decoder-only LM whose logits are head(hidden states), with its tokenizer.

    model: `PreTrainedModel` with float32 weights. tokenizer: a fast tokenizer. If it has no pad token, end-of-text
    pads: the vocabulary never grows (padding is found by the mask, never by its id).

    Attributes:
        vocabulary: the largest id of a real token + 1.
        unused_ids: the other rows of the embedding, which are never generated: padding of the matrix, gaps between ids,
            a pad token added behind all others.
        end_ids: the ids that end a generated text: the tokenizer's end-of-text, then those that the generation_config
            of the model's folder lists.
        pack_rows, prune_last_block: for debugging; False makes `label_hidden` compute padding too, and the last block
            at every position.

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
        self.batch_decoding_is_exact: dict[int, bool] = {}  # by length; filled by model/decoding/kv_cache.py
        real = real_tokens(tokenizer)
        if self.prompt_template is not None:  # a folder that we saved lists the ids that its loss excluded
            excluded = {*(model.generation_config.suppress_tokens or ())}
            real = {index: token for index, token in real.items() if index not in excluded}
        self.vocabulary = max(real) + 1
        self.unused_ids = [row for row in range(embedding_rows(model)) if row not in real]
        gaps = [row for row in self.unused_ids if row < self.vocabulary]
        self.register_buffer("_gaps", torch.tensor(gaps) if gaps else None, persistent=False)
        self.end_ids = all_end_ids(model, tokenizer, real)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context(self) -> int:
        """Maximum number of tokens of a row: the model's positions, else the tokenizer's limit, else 1024."""
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(value := getattr(self.model.config, name, None), int) and value > 0:
                return value
        limit = self.tokenizer.model_max_length
        return limit if limit < 10**9 else 1024

    @property
    def prompt_template(self) -> str | None:
        """Template of the prompts that this model was trained on; stored in its config.json."""
        return getattr(self.model.config, "prompt_template", None)

    @property
    def prompt_max_length(self) -> int | None:
        """`max_length` of the rows that this model was trained on; stored in its config.json."""
        return getattr(self.model.config, "prompt_max_length", None)

    @property
    def max_new_tokens(self) -> int | None:
        """Length of a generated text, as recorded in the model's generation_config, or None."""
        return self.model.generation_config.max_new_tokens

    def record_training(self, prompt_template: str, prompt_max_length: int, max_new_tokens: int | None = None) -> None:
        """Store with the weights what is needed to prompt the model and decode as in training."""
        self.model.config.prompt_template = prompt_template
        self.model.config.prompt_max_length = prompt_max_length
        self.model.generation_config.max_new_tokens = max_new_tokens

    def parameter_count(self) -> int:
        """Number of parameters; a head tied to the embedding counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # -- operations ----------------------------------------------------------------------------------------------

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D], ready for `lm_head`.

        input_ids [B, T] on the model's device; attention_mask [B, T] (1 = token, 0 = padding) there or on the CPU.
        With padding on the right causal attention needs no mask: a token never sees what follows it. So a mask on the
        CPU is inspected and dropped if the padding is on the right; inspecting one on another device would mean waiting
        for it. Padding on the left gets the mask, and positions that start at each row's first token.
        """
        arguments = {}
        if attention_mask is not None and not is_right_padded(attention_mask):
            attention_mask = to_device(attention_mask, input_ids.device)
            arguments["attention_mask"] = attention_mask
            if self._takes_positions:
                arguments["position_ids"] = position_ids(attention_mask)
        return self.model.base_model(input_ids=input_ids, use_cache=False, **arguments)[0]

    def label_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, embedding_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(hidden states [N, D] that predict a label, the labels [N]), in row order, on the model's device.

        Arguments [B, T] as for `hidden_states` and `label_positions`; if they are on the CPU, nothing waits for the
        device. For GPT-2 with padding on the right, neither padding nor anything behind a row's last label is computed,
        and positions that predict no label get only keys and values in the last block.

        embedding_weight: of `tied_head`, if the hidden states go through that head.
        """
        index, targets = label_positions(labels)
        targets, input_ids = to_device(targets, self.device), to_device(input_ids, self.device)
        right_padded = attention_mask is None or is_right_padded(attention_mask.cpu())
        if not (right_padded and len(index) and self._packs()):
            hidden = self.hidden_states(input_ids, attention_mask).flatten(0, 1)
            return hidden[to_device(index, self.device)], targets
        packing = plan_packing(index.cpu(), tuple(labels.shape), self.pack_rows, self.device)
        hidden = packed_hidden_states(
            self.model.base_model, input_ids, packing, self.prune_last_block, embedding_weight=embedding_weight,
            compiled=self._compiled,
        )
        return hidden, targets

    def _packs(self) -> bool:
        return can_pack(self.model) and (self.pack_rows or self.prune_last_block)

    def compile_forward(self) -> None:
        """Compile training's forward pass: what lies between two attentions if rows are packed, else the library's own.

        Takes about a minute at the first step, and again for each new shape of step.
        """
        if self._packs():
            self._compiled = True
        else:
            self.model.base_model.compile(dynamic=True)

    def output_head(self) -> OutputHead:
        """The head as tensors, for `vocabulary_loss`: the same logits as `lm_head`, but for `unused_ids`."""
        head = self.model.get_output_embeddings()
        return OutputHead(head.weight, head.bias, self._logit_scale, self._logit_cap, self.vocabulary, self._gaps)

    def tied_head(self) -> tuple[OutputHead, Tensor | None]:
        """(`output_head`, the `embedding_weight` of `label_hidden`) for a training step.

        If both are one weight, the embedding's gradient is added to the head's in place, without a second tensor of
        that size; else embedding_weight is None.
        """
        head, embedding = self.output_head(), self.model.get_input_embeddings().weight
        if head.weight is not embedding or not embedding.requires_grad or not can_pack(self.model):
            return head, None
        embedding_weight, weight = tied(embedding)
        return head._replace(weight=weight), embedding_weight

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

    def last_hidden(self, input_ids: Tensor, cache, **arguments) -> Tensor:
        """Hidden states [B, D] of the last of new tokens [B, S] that continue `cache` (a `transformers` Cache).

        `cache` grows by S. arguments: others of the library's forward pass; without them rows have no padding.
        """
        arguments[self.cache_argument] = cache
        return self.model.base_model(input_ids=input_ids, use_cache=True, **arguments)[0][:, -1]

    def limit_vocabulary(self, vocabulary: int) -> None:
        """From now on only ids below `vocabulary` are real tokens."""
        self.vocabulary = min(vocabulary, self.vocabulary)
        self.unused_ids = sorted({*self.unused_ids, *range(self.vocabulary, embedding_rows(self.model))})

    def remove_unused_rows(self) -> int:
        """Truncate embedding and head behind the tokenizer's largest id; returns the number of rows removed.

        Only before training: an optimizer's state has the shape of the rows that were there.
        """
        rows = token_rows(self.tokenizer)
        removed = embedding_rows(self.model) - rows
        if removed > 0:
            self.model.resize_token_embeddings(rows)
            config = self.model.config.get_text_config()
            if (getattr(config, "pad_token_id", None) or 0) >= rows:  # no embedding could be built for it
                config.pad_token_id = None
            self.unused_ids = [row for row in self.unused_ids if row < rows]
        return removed

    def save(self, folder: Path) -> None:
        """Write a standard folder that `AutoModelForCausalLM` and `AutoTokenizer` load with the library alone.

        The library's `generate` then decodes as `greedy_decode` does: the model's former generation settings, such as
        penalties, are not kept.
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
    """Whether every row of a mask on the CPU is 1...1 0...0. False for a mask on another device."""
    if attention_mask.device.type != "cpu":
        return False
    return bool((attention_mask[:, :-1] >= attention_mask[:, 1:]).all())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context with a module in eval mode; afterwards every submodule is back in its own mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


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
