"""Whether teacher and student have the same vocabulary: without that no divergence between them means anything."""

from model.language_model import ModelError, real_tokens


def shared_vocabulary(teacher_tokenizer, student_tokenizer) -> int:
    """Number of token ids that both models have, the same strings for the same ids.

    A pad token that one side has added at the end is no real token and is left out.

    Raises:
        ModelError: sizes and the first token that differs.
    """
    teacher, student = (real_tokens(tokenizer) for tokenizer in (teacher_tokenizer, student_tokenizer))
    if teacher == student or teacher_tokenizer.get_vocab() == student_tokenizer.get_vocab():
        return min(max(teacher), max(student)) + 1  # without a pad token that one side alone pads with
    first = min(token for token in teacher.keys() | student.keys() if teacher.get(token) != student.get(token))
    told = [repr(tokens[first]) if first in tokens else "none" for tokens in (teacher, student)]
    raise ModelError(
        f"teacher and student have different vocabularies ({len(teacher)} and {len(student)} tokens; the first that "
        f"differs has id {first}: {told[0]} and {told[1]}): distil between models of one tokenizer"
    )
