"""How a chunked loss goes through its positions: model/losses/vocabulary_loss.py."""

import pytest
import torch

from model.losses.output_head import OutputHead
from model.losses.vocabulary_loss import chunked_loss, vocabulary_loss


@pytest.mark.parametrize("in_blocks", [True, False])
def test_terms_in_blocks(in_blocks):
    """Fault: a chunk's terms are formed all at once on a CPU, or in parts where they need all of it; a block is left
    out, or handed other positions than its own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
    asked = []

    def terms(logits, part, of_teacher, with_gradient):
        asked.append((part.start, part.stop))
        scale = torch.arange(part.start, part.stop)[:, None].float()
        return (logits.square() * scale).sum()[None], 2 * logits * scale

    parts = [slice(0, 40), slice(40, 50)]
    loss, _ = chunked_loss(hidden, OutputHead(weight), parts, terms, vocabulary=30, in_blocks=in_blocks)
    expected = ((hidden @ weight.T).square() * torch.arange(50)[:, None]).sum()
    assert asked == ([(0, 16), (16, 32), (32, 40), (40, 50)] if in_blocks else [(0, 40), (40, 50)])
    torch.testing.assert_close(loss, expected)
    found, plain = (torch.autograd.grad(each, (hidden, weight)) for each in (loss, expected))
    torch.testing.assert_close(found, plain)


def test_second_backward_is_refused():
    """Fault: gradients that were handed out, and changed by their owner, are handed out again."""
    hidden, weight = torch.randn(3, 6, requires_grad=True), torch.randn(30, 6)
    loss = vocabulary_loss(hidden, OutputHead(weight), torch.tensor([1, 2, 3])).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()
