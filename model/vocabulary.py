"""Token ids: which rows of an embedding are tokens, and whether two models have the same vocabulary."""

from torch import nn

from model.errors import ModelError


def check_tokenizer(model: nn.Module, tokenizer) -> None:
    """Raises ModelError if the tokenizer cannot serve the model."""
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
    """Number of rows that an embedding needs: the largest id + 1, since ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=0)


def real_tokens(tokenizer) -> dict[int, str]:
    """Token of each id, without a pad token that was added behind all others."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    last = max(tokens)
    if last == tokenizer.pad_token_id and last != tokenizer.eos_token_id and last in tokenizer.added_tokens_decoder:
        del tokens[last]
    return tokens


def all_end_ids(model: nn.Module, tokenizer, real: dict[int, str]) -> list[int]:
    """The tokenizer's end-of-text, then the other ends that the model's generation_config lists."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return [*dict.fromkeys([tokenizer.eos_token_id, *(end for end in listed if end in real)])]


def shared_vocabulary(teacher_tokenizer, student_tokenizer) -> int:
    """Number of token ids that both models have, the same strings for the same ids.

    A pad token that one side has added at the end is not a real token and does not count.

    Raises:
        ModelError: names the sizes and the first token that differs.
    """
    teacher, student = (real_tokens(tokenizer) for tokenizer in (teacher_tokenizer, student_tokenizer))
    if teacher == student or teacher_tokenizer.get_vocab() == student_tokenizer.get_vocab():
        return min(max(teacher), max(student)) + 1  # without a pad token that only one side pads with
    first = min(token for token in teacher.keys() | student.keys() if teacher.get(token) != student.get(token))
    names = [repr(tokens[first]) if first in tokens else "none" for tokens in (teacher, student)]
    raise ModelError(
        f"teacher and student have different vocabularies ({len(teacher)} and {len(student)} tokens; the first that "
        f"differs has id {first}: {names[0]} and {names[1]}): distil between models of one tokenizer"
    )
