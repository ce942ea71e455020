"""train.py as a user meets it: help, errors of one line, families of models."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig, Qwen2Config

import train
from tests.conftest import END, ROOT, byte_tokenizer, write_rows
from tests.small_runs import changed, make_project, metrics, run

SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 320, "bos_token_id": END, "eos_token_id": END}


def last_error(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("config", [
    LlamaConfig(**SIZES), Qwen2Config(**{**SIZES, "num_key_value_heads": 1}), GPTNeoXConfig(**SIZES),
], ids=lambda config: config.model_type)
def test_other_families_train_and_load_with_the_library_alone(tmp_path, config):
    """Fault: a wrapper that only works for GPT-2."""
    project = make_project(tmp_path, rows=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    settings = changed(project, trainer_kwargs={"epochs": 3, "metrics": ["rouge"]}, optimizer_kwargs={"lm_lr": 3e-3})
    assert run(tmp_path, settings) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "run", "validation")]
    assert losses[-1] < losses[0]
    folder = tmp_path / "run/model_checkpoints/last"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == config.model_type
    assert model.config.prompt_template == "{article}\nTL;DR:"
    assert len(AutoTokenizer.from_pretrained(folder)) == 257


def test_print_config_is_a_config(tmp_path, capsys):
    """Fault: --print_config prints what cannot be used."""
    assert train.main(["--config", str(ROOT / "config.json"), "--print_config"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["model_arch"]["lang_model"] == "gpt2-medium"
    (tmp_path / "again.json").write_text(text)
    assert train.main(["--config", str(tmp_path / "again.json"), "--print_config"]) == 0
    assert capsys.readouterr().out == text


def test_shipped_recipe_without_hub_names_the_way(tmp_path, monkeypatch, capsys):
    """Fault: thirty lines of a library's traceback where the hub is not reachable."""
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(ROOT / "config.json")]) == 2
    error = last_error(capsys)
    assert error.startswith("train.py: error: model_arch.lang_model: cannot get 'gpt2-medium' from the hub")
    assert "hf download gpt2-medium" in error
    assert "./demo.sh" in error


@pytest.mark.parametrize(("section", "values", "message"), [
    ("trainer_kwargs", {"epoch": 3}, "trainer_kwargs.epoch is unknown"),
    ("optimizer_kwargs", {"lm_lr": "5e-5"}, "5e-5 without quotes"),
    ("optimizer_kwargs", {"type": "LBFGS"}, "optimizer_kwargs.type"),
    ("model_arch", {"generation_kwargs": {"max_generation_length": 316}}, "max_generation_length is 316"),
    ("dataset_kwargs", {"max_length": 500}, "max_length is 500"),
    ("dataset_kwargs", {"max_length": 8}, "prompt_template takes 7 tokens"),
    ("model_arch", {"architecture": {"n_layer": 2}}, "from_scratch"),
    ("model_arch", {"from_scratch": True, "architecture": {"n_layers": 2}}, "did you mean n_layer?"),
])
def test_errors_are_one_line(tmp_path, capsys, section, values, message):
    """Fault: a traceback, or a late crash, for a setting that cannot work."""
    config = changed(changed(make_project(tmp_path), trainer_kwargs={"metrics": ["rouge"]}), **{section: values})
    assert run(tmp_path, config) == 2
    assert message in last_error(capsys)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_bad_rows_are_refused_or_listed(tmp_path, capsys):
    """Fault: empty rows train on nothing, or vanish without a word (case A23)."""
    project = make_project(tmp_path, rows=8)
    rows = [{"id": str(number), "article": "storm hits town" if number != 2 else "  ", "highlights": "storm"}
            for number in range(8)]
    write_rows(tmp_path / "train.csv", rows)
    assert run(tmp_path, project) == 2
    error = last_error(capsys)
    assert "row 3" in error
    assert "train.csv" in error
    assert run(tmp_path, changed(project, dataset_kwargs={"on_bad_row": "skip"})) == 0
    assert "skipped: " in capsys.readouterr().err
    listed = json.loads((tmp_path / "run/skipped_rows.json").read_text())
    assert [row["number"] for row in listed[str(tmp_path / "train.csv")]] == [3]


def test_from_scratch_needs_only_a_tokenizer(tmp_path):
    """Fault: random weights of a known GPT-2 shape need the hub."""
    config = changed(make_project(tmp_path, rows=8), model_arch={
        "lang_model": "gpt2", "from_scratch": True, "tokenizer": str(tmp_path / "model"), "dropout": 0.0,
        "architecture": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 320},
    })
    assert run(tmp_path, config) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model_checkpoints/last")
    assert (model.config.n_layer, model.config.vocab_size, model.config.eos_token_id) == (1, 257, END)
    assert byte_tokenizer().eos_token_id == END


def test_gpu_keys_are_ignored_with_a_notice_without_gpu(tmp_path, capsys):
    """Fault: a config made for GPU 7 does not run on a laptop."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    config = changed(make_project(tmp_path, rows=4), model_arch={"gpu_device_id": 7},
                     trainer_kwargs={"device": "cuda", "multi_gpu": True, "multi_gpu_ids": [1, 3]})
    assert run(tmp_path, config) == 0
    error = capsys.readouterr().err
    assert 'no GPU here: device "cuda" and model_arch.gpu_device_id 7 ignored' in error
    assert "multi_gpu ignored" in error
