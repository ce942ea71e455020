"""Legacy `.pt` state dicts load strictly, and nothing in them runs: model/legacy.py."""

import pytest
import torch

from model.decoding.loop import greedy_decode
from model.errors import ModelError
from model.language_model import LanguageModel
from model.legacy import load_legacy_weights, strip_prefixes
from model.loading import load_language_model
from tests.conftest import byte_tokenizer, tiny_gpt2, tiny_language_model
from tests.model.test_fine_tuning import gpt2_with_constant_logits
from tests.model.test_loading import Bomb


@pytest.fixture
def architecture(tmp_path) -> str:
    """A standard folder whose architecture the state dicts have."""
    tiny_language_model(seed=7).save(tmp_path / "model")
    return str(tmp_path / "model")


def saved(tmp_path, content):
    torch.save(content, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def legacy_refusal(path, model=None) -> str:
    model = model or tiny_gpt2(seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_legacy_weights(model, path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def assert_same_weights(model, other):
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_prefixes_of_a22():
    """`module.` is removed inside keys too: `submodule.weight` becomes `subweight` (A22)."""
    keys = ["module.transformer.wte.weight", "module.transformer.h.0.submodule.weight", "transformer.mymodule.bias"]
    stripped = strip_prefixes({key: torch.ones(1) for key in keys}, {"transformer.wte.weight"})
    assert list(stripped) == ["transformer.wte.weight", "transformer.h.0.submodule.weight", "transformer.mymodule.bias"]


@pytest.mark.parametrize(("prefix", "wrapper"), [
    ("", None), ("", "model"), ("module.", "model_state_dict"), ("module.module.", "state_dict"), ("_orig_mod.", None),
    ("module._orig_mod.", "model"), ("model.gpt2.", "model_state_dict")])
def test_legacy_file_loads(tmp_path, architecture, prefix, wrapper):
    """Prefixed keys, a nested state dict or old buffers leave the weights random, without an error (A22)."""
    source = tiny_gpt2(seed=3)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril().bool()
    state[f"{prefix}transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    model = load_language_model(architecture, weights=saved(tmp_path, content))
    assert_same_weights(model.model, source)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    assert model.parameter_count() == 9472


def test_legacy_formats_and_architectures(tmp_path, architecture):
    """A `.pt` file needs the hub or a folder with weights, although only the shape of its architecture is asked for;
    the format before torch 1.6 or half precision is refused."""
    (tmp_path / "model" / "model.safetensors").unlink()
    source = tiny_gpt2(seed=3)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}
    path = saved(tmp_path, source.state_dict())
    model = load_language_model("gpt2", tokenizer=architecture, from_scratch=True, architecture=sizes, weights=path)
    assert_same_weights(model.model, source)
    torch.save(source.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same_weights(load_language_model(architecture, weights=str(tmp_path / "old.pt")).model, source)
    half = {key: value.half() for key, value in source.state_dict().items()}
    model = load_language_model(architecture, weights=saved(tmp_path, half))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("with_head", [True, False])
def test_pad_row_is_cut(tmp_path, with_head):
    """The [PAD] row of an old script, with a logit of 0, beats logits of -33 and all text is [PAD] (A13)."""
    plain = gpt2_with_constant_logits({0: -35, 1: -33, 2: -36})
    state = dict(plain.state_dict())
    pad_row = torch.zeros(1, 16)
    grown = torch.cat([state["transformer.wte.weight"], pad_row])
    final = plain.transformer.ln_f.bias
    assert (grown @ final).argmax() == 257 and (grown @ final).double().softmax(0)[257] > 1 - 1e-13
    state |= {"transformer.wte.weight": grown, "lm_head.weight": grown}
    if not with_head:
        del state["lm_head.weight"]
    model = LanguageModel(tiny_gpt2(seed=0), byte_tokenizer())
    load_legacy_weights(model.model, saved(tmp_path, state))
    assert greedy_decode(model, [[72, 105]], 3) == [[1, 1, 1]]
    assert_same_weights(model.model, plain)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight


@pytest.mark.parametrize("protocol", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, protocol):
    """A class in a user's pickle is run."""
    state = tiny_gpt2().state_dict() | {"note": Bomb(tmp_path / "ran")}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=protocol)
    assert "not unpickled" in legacy_refusal(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("change", "expected"), [
    (lambda s: s.pop("transformer.ln_f.bias"), "1 missing (transformer.ln_f.bias)"),
    (lambda s: s.update({"transformer.more": torch.ones(1)}), "1 unexpected (transformer.more)"),
    (lambda s: s.update({"transformer.ln_f.bias": torch.ones(3)}), "transformer.ln_f.bias is [3], expected [16]"),
    (lambda s: s.update({"transformer.ln_f.bias": torch.tensor(1.0)}), "ln_f.bias is [], expected [16]"),
    (lambda s: s.update({"lm_head.weight": torch.ones(257, 16)}), "lm_head.weight differs from transformer.wte"),
    (lambda s: s.update({"transformer.wte.weight": torch.tensor(1.0)}), "transformer.wte.weight"),
    (lambda s: s.update(dict.fromkeys(["transformer.wte.weight", "lm_head.weight"], torch.ones(259, 16))),
     "is [259, 16], expected [257, 16]"),  # more than the one [PAD] row
    (lambda s: s.update(tiny_gpt2(layers=2).state_dict()), "12 unexpected (transformer.h.1.attn.c_attn.bias)"),
    (lambda s: [s.update({f"{key}.x": s.pop(key)}) for key in list(s)], "17 missing"),
])
def test_keys_that_do_not_fit(tmp_path, change, expected):
    """Missing, unexpected or misshaped keys leave random weights without an error (A22)."""
    state = dict(tiny_gpt2(seed=3).state_dict())
    change(state)
    assert expected in legacy_refusal(saved(tmp_path, state))


@pytest.mark.parametrize("content", [[1, 2], {}, torch.ones(2), {1: torch.ones(1)}, {"a": 1}, {"model": {"a": 1}}])
def test_not_a_state_dict(tmp_path, content):
    """Something else in a `.pt` file ends in a traceback."""
    assert "is not a state dict" in legacy_refusal(saved(tmp_path, content))


@pytest.mark.parametrize("zipped", [True, False])
def test_legacy_file_cut_off_or_missing(tmp_path, zipped):
    """A half-copied file, another one or a wrong path ends in a traceback, or half of the weights are loaded (A21)."""
    path = tmp_path / "old.pt"
    assert "does not exist" in legacy_refusal(path)
    torch.save(tiny_gpt2(seed=3).state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for part in (0, 0.001, 0.1, 0.5, 0.999):
        path.write_bytes(content[: int(part * len(content))])
        assert "damaged" in legacy_refusal(path)
    path.write_text("hello")
    assert "damaged" in legacy_refusal(path)
