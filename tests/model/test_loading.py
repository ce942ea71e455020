"""Where a model comes from: model/loading.py. Legacy state dicts: test_legacy_weights.py."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from model import loading
from model.errors import ModelError
from model.language_model import LanguageModel
from model.loading import check_same_architecture, load_language_model
from tests.conftest import END, byte_tokenizer, tiny_gpt2, tiny_language_model
from tests.model.test_fine_tuning import FineTuning, right_padded

# Parameters as counted by hand: V * D + P * D + layers * (12 D^2 + 13 D) + 2 D, V = 50257, P = 1024.
GPT2_PARAMETERS = {
    "distilgpt2": 81_912_576, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.fixture
def folder(tmp_path):
    """A standard folder of a tiny GPT-2 with its byte tokenizer."""
    tiny_language_model(seed=7, dropout=0.1).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path) -> str:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def refusal(name, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load_language_model(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def dropout_rates(model: LanguageModel) -> set[float]:
    return {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)}


# -- folders ---------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """A saved folder needs this project to load, or loses weights, template or end-of-text."""
    model = tiny_language_model(seed=7)
    model.record_training("{article} =>", 99)
    model.save(tmp_path)
    network, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    again = load_language_model(str(tmp_path))
    assert again.prompt_template == network.config.prompt_template == "{article} =>"
    assert again.prompt_max_length == 99
    assert tokenizer("Hi é").input_ids == again.tokenizer("Hi é").input_ids == [72, 105, 32, 195, 169]
    assert again.end_ids == [tokenizer.eos_token_id] == [network.config.eos_token_id] == [END]
    for other in (network, again.model):
        for (name, ours), theirs in zip(model.model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name


def test_loaded_for_training(folder):
    """A loaded model is in eval mode, frozen, or in half precision; or from_scratch trains on from its weights."""
    tiny_gpt2(seed=7).to(torch.bfloat16).save_pretrained(folder)
    model = load_language_model(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    fresh = load_language_model(str(folder), from_scratch=True).model.transformer.wte.weight
    assert not torch.equal(model.model.transformer.wte.weight, fresh)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_tied_head_stays_tied(folder, from_scratch):
    """The head is a copy of the embedding, at once or after an optimizer step, or is counted twice (A22)."""
    model = load_language_model(str(folder), from_scratch=from_scratch)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        embedding, head = model.model.transformer.wte.weight, model.model.lm_head.weight
        assert embedding is head and embedding.data_ptr() == head.data_ptr()
        assert model.parameter_count() == sum(len(group["params"]) and sum(p.numel() for p in group["params"])
                                              for group in optimizer.param_groups) == 9472
        FineTuning(model)(*right_padded([(b"Q:", b"ok")])).loss_sum.backward()
        optimizer.step()


def test_run_folder_and_missing_paths(folder, tmp_path):
    """The folder of a run, a folder of something else or a wrong path ends in the library's long message."""
    run = tmp_path / "run"
    (run / "model_checkpoints").mkdir(parents=True)
    assert f"{run} has no config.json: a model folder is what save_pretrained writes" in refusal(run)
    folder.rename(run / "model_checkpoints" / "last")
    assert f"did you mean {run / 'model_checkpoints' / 'last'}?" in refusal(run)
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    for name in ("./nope", "no/such/place", "old.pt"):
        assert refusal(name).startswith(f"{name} does not exist: expected a model folder or a hub id")
    (tmp_path / "old.pt").write_bytes(b"x")
    assert "old.pt is a file: expected a model folder" in refusal(tmp_path / "old.pt")


def test_folder_without_weights_or_tokenizer(folder):
    """A folder without weights gives random ones in silence; one without tokenizer the library's long advice."""
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(folder)
    assert load_language_model(str(folder), from_scratch=True).parameter_count() == 9472
    (folder / "tokenizer.json").unlink()
    message = refusal(folder)
    assert f"{folder} has no tokenizer (tokenizer.json)" in message and "model_arch.tokenizer" in message


@pytest.mark.parametrize(("values", "expected"), [
    ({"n_layer": 2}, "12 of its weights do not fit its config.json, the first is transformer.h.1.attn.c_attn.bias"),
    ({"n_positions": 64}, "1 of its weights do not fit its config.json, the first is transformer.wpe.weight"),
    ({"n_layer": "x"}, "cannot be loaded: "),
    ({"model_type": "t5"}, "cannot be loaded: "),
])
def test_config_that_does_not_fit_the_weights(folder, values, expected):
    """Weights that are missing or of another shape are random in silence (A22), or a traceback."""
    edit_config(folder, **values)
    message = refusal(folder)
    assert message.startswith(str(folder)) and expected in message


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_file_cut_off(folder, file):
    """A half-copied folder ends in a traceback of one of the libraries (A21)."""
    path = folder / file
    content = path.read_bytes()
    for size in (0, 20, 500):
        path.write_bytes(content[: min(size, len(content) - 5)])
        message = refusal(folder)
        assert message.startswith(str(folder)) and "cannot be loaded" in message


def test_code_beside_a_model_never_runs(folder, tmp_path, monkeypatch):
    """Code that lies beside a model is run, or the user is asked whether to run it."""
    mark = tmp_path / "ran"
    (folder / "strange.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    edit_config(folder, model_type="strange",
                auto_map={"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"})
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    assert "cannot be loaded" in refusal(folder)
    assert not asked and not mark.exists()


class Bomb:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_not_run(folder, tmp_path):
    """A `pytorch_model.bin` with more than tensors is unpickled, or the message recommends to do so."""
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "not unpickled" in message and "weights_only" not in message
    assert not (tmp_path / "ran").exists()


# -- hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "offline"), [("gpt2", True), ("someone/no-such-model", False)])
def test_hub_out_of_reach(name, offline, monkeypatch):
    """Offline, or where nothing answers, the library's own long message comes, which names no remedy."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(loading.hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(loading.hub, "ENDPOINT", "http://127.0.0.1:9")
    message = refusal(name)
    assert f"cannot get '{name}' from the hub" in message
    assert f"hf download {name}" in message and "./demo.sh" in message and "local folder" in message


# -- random weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GPT2_PARAMETERS)
def test_gpt2_shapes_need_no_hub(name, tokenizer):
    """A shape of the GPT-2 family is not known without the hub, or is not the published one."""
    with torch.device("meta"):
        model = load_language_model("openai-community/" + name, tokenizer=tokenizer, from_scratch=True,
                                    architecture={"vocab_size": 50257})
    assert (model.parameter_count(), model.context) == (GPT2_PARAMETERS[name], 1024)
    check_same_architecture(model.model.config, name)


def test_from_scratch(tokenizer):
    """Vocabulary and end-of-text of random weights are GPT-2's, not the tokenizer's; or an override is lost."""
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_positions": 32}
    model = load_language_model("gpt2", tokenizer=tokenizer, from_scratch=True, architecture=sizes)
    config = model.model.config
    assert (config.vocab_size, config.eos_token_id, config.bos_token_id) == (257, END, END)
    assert (len(model.model.transformer.h), model.context) == (3, 32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    other = load_language_model("gpt2", tokenizer=tokenizer, from_scratch=True, architecture=sizes)
    assert not torch.equal(model.model.transformer.wte.weight, other.model.transformer.wte.weight)


@pytest.mark.parametrize(("architecture", "expected"), [
    ({"n_layre": 2}, "architecture.n_layre is unknown: did you mean n_layer?"),
    ({"n_positions": -1}, "architecture.n_positions is -1: expected at least 1"),
    ({"n_layer": "two"}, "architecture.n_layer is 'two': "),
    ({"n_head": 5}, "'gpt2' cannot be built with this architecture: "),
    ({"vocab_size": 256}, "257 tokens but the model's embedding only 256 rows"),
])
def test_architecture_that_cannot_be(tokenizer, architecture, expected):
    """A misspelt or impossible override is ignored, gives a model without layers, or a traceback."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2} | architecture
    assert expected in refusal("gpt2", tokenizer=tokenizer, from_scratch=True, architecture=sizes)


def test_architecture_of_pretrained_weights(folder):
    """An override is applied to a model whose stored weights then do not fit; a name that is not theirs is believed."""
    message = refusal(folder, architecture={"n_layer": 2})
    assert "{'n_layer': 2}" in message and "from_scratch" in message
    check_same_architecture(tiny_gpt2().config, str(folder))
    with pytest.raises(ModelError, match=r"not a 'gpt2-medium': its num_hidden_layers is 1, 'gpt2-medium' has 24"):
        check_same_architecture(tiny_gpt2().config, "gpt2-medium")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout(folder, tmp_path, dropout):
    """A dropout rate reaches only some of the dropouts, or only GPT-2's."""
    assert dropout_rates(load_language_model(str(folder))) == {0.1}
    assert dropout_rates(load_language_model(str(folder), dropout=dropout)) == {dropout}
    assert dropout_rates(load_language_model(str(folder), dropout=dropout, from_scratch=True)) == {dropout}
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "intermediate_size": 64}
    for config in (LlamaConfig(**sizes), GPTNeoXConfig(**sizes, hidden_dropout=0.1)):
        path = tmp_path / config.model_type
        LanguageModel(AutoModelForCausalLM.from_config(config), byte_tokenizer()).save(path)
        model = load_language_model(str(path), dropout=dropout)
        assert model.model.config.attention_dropout == dropout
        rates = {part.attention_dropout for part in model.modules() if hasattr(part, "attention_dropout")}
        assert rates | dropout_rates(model) == {dropout}


@pytest.mark.parametrize(("name", "layers", "width"), [("demo-teacher", 3, 128), ("demo-student", 2, 96)])
def test_demo_models(tokenizer, monkeypatch, tmp_path, name, layers, width):
    """A built-in demo model needs the hub, has another shape than demo.md's, or fails without a word on its news."""
    model = load_language_model(name, tokenizer=tokenizer, architecture={"n_positions": 64})
    assert (len(model.model.transformer.h), model.model.config.n_embd, model.context) == (layers, width, 64)
    assert dropout_rates(model) == {0.0}
    monkeypatch.setattr(loading, "DEMO_TOKENIZER", tmp_path / "no-tokenizer")
    assert "no-tokenizer is missing" in (message := refusal(name)) and "python -m data.demo_news" in message
