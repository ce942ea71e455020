"""Compares the wrapper with the library's own logits: `LanguageModel` must be exact for a family, or refuse it."""

import torch
from torch import Tensor, nn

from model.errors import ModelError, one_line_errors
from model.label_shift import IGNORED
from model.language_model import LanguageModel, evaluating


@torch.no_grad()
def verify_model(language_model: LanguageModel) -> None:
    """Run six tokens through the library's forward pass and through each of ours.

    Raises:
        ModelError: weights or logits are not finite, or ours differ: the family's logits are not head(hidden states),
            or padding on the left or a key/value cache changes them.
    """
    model, device, name = language_model.model, language_model.device, type(language_model.model).__name__
    check_finite_weights(model)
    ids = torch.arange(6, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    padded = torch.cat([ids[:, :1].expand(1, 3), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]], device=device)
    labels = torch.cat([torch.full_like(ids[:, :1], IGNORED), ids[:, 1:]], dim=1)

    def last_by_cache() -> Tensor:
        cache = language_model.new_cache()
        for part in ids.split([4, 1, 1], dim=1):
            hidden = language_model.last_hidden(part, cache)
        return hidden

    with evaluating(language_model):
        with one_line_errors(f"{name}: take another checkpoint, since its config.json cannot run a forward pass"):
            expected = model(input_ids=ids, use_cache=False).logits[0].float()
        if not expected.isfinite().all():
            raise ModelError(f"{name}: its weights are finite but its outputs are not: take another checkpoint, or set "
                             "precision to float32")
        for fault, hidden, logits in (
            ("are not head(hidden states)", lambda: language_model.hidden_states(ids)[0], expected),
            ("change with padding on the left", lambda: language_model.hidden_states(padded, mask)[0, 3:], expected),
            ("change at label positions", lambda: language_model.label_hidden(ids, None, labels)[0], expected[:-1]),
            ("change with a key/value cache", last_by_cache, expected[-1:]),
        ):
            refused = f"{name}: its logits {fault}: this family is not supported; GPT-2, Llama, Qwen2, GPT-NeoX are"
            with one_line_errors(refused, with_reason=False):  # of the library too, for arguments it does not take
                ours = language_model.lm_head(hidden()).float()
                torch.testing.assert_close(ours, logits, rtol=0, atol=1e-3 * float(logits.abs().max()))


def check_finite_weights(model: nn.Module) -> None:
    """Raises ModelError that names the first weight with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        bad = ~parameter.isfinite()
        if bad.any():
            rows = bad.reshape(len(bad) if bad.dim() else 1, -1).any(1).nonzero()[:8, 0].tolist()
            raise ModelError(
                f"{getattr(model, 'name_or_path', '') or type(model).__name__}: its weights are not finite, "
                f"{int(bad.sum())} of {bad.numel()} values of {name} (rows {', '.join(map(str, rows))}): take another "
                "checkpoint, or train it again with a lower learning rate"
            )
