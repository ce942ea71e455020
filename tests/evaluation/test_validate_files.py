# ruff: noqa: F811 (fixtures of the other file)
"""validate_model.py on awkward CSVs, legacy weights and failing runs."""

import shutil

import pytest
import torch

import validate_model
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.evaluation.test_validate_model import (  # noqa: F401
    ARTICLES,
    error_line,
    folder,
    read_output,
    run,
    texts,
    write_news,
)
from utils.runs import score_table

# -- columns and bad rows ----------------------------------------------------------------------------------------


def test_columns_of_other_names(tmp_path, folder):
    """Fault: only id, article and highlights are understood, or a mapped column is carried twice."""
    path = write_rows(tmp_path / "x.csv", [{"key": "k1", "text": "Rain fell.", "summary": "Rain.", "category": "w"}])
    flag = '{"id": "key", "article": "text", "highlights": "summary"}'
    code, [record], _ = run(tmp_path, folder, path, "--columns", flag)
    assert (code, record["id"], record["article"], record["target_highlight"], record["category"]) == (
        0, "k1", "Rain fell.", "Rain.", "w")
    assert not {"key", "text", "summary"} & record.keys()


def news_with_a_bad_row(tmp_path):
    rows = [{"id": f"n{index}", "article": text, "highlights": "A town."} for index, text in enumerate(ARTICLES[:4])]
    rows[2]["article"] = "  "
    return write_rows(tmp_path / "bad.csv", rows)


def test_skipped_rows_are_counted_and_named(tmp_path, folder, capsys):
    """Fault: rows vanish in silence, so that scores of two runs are over different rows and nobody knows."""
    code, predictions, scores = run(tmp_path, folder, news_with_a_bad_row(tmp_path), "--on_bad_row", "skip")
    assert (code, [record["id"] for record in predictions]) == (0, ["n0", "n1", "n3"])
    assert (scores["rows"], scores["skipped_rows"], scores["settings"]["on_bad_row"]) == (3, 1, "skip")
    output = capsys.readouterr().err
    assert "skipped: " in output and "row 3 (line 4, id 'n2'): empty article" in output


# -- models ------------------------------------------------------------------------------------------------------


def legacy_file(tmp_path, folder):
    """A state dict as old scripts wrote it: data-parallel keys, a [PAD] row at the end of the embedding."""
    gpt2 = tiny_gpt2(seed=4, std=0.5)
    gpt2.load_state_dict(score_table.load_language_model(str(folder)).model.state_dict())
    state = {f"module.{key}": value for key, value in gpt2.state_dict().items()}
    for key in ("module.transformer.wte.weight", "module.lm_head.weight"):
        state[key] = torch.cat([state[key], torch.ones(1, 16)])
    torch.save(state, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def test_legacy_state_dict_with_model_name(tmp_path, folder):
    """Fault: A22, keys that start with `module.` and a [PAD] row: weights stay random in silence, or [PAD] wins."""
    path = write_news(tmp_path / "news.csv")
    code, predictions, scores = run(tmp_path, legacy_file(tmp_path, folder), path, "--model_name", str(folder))
    assert (code, scores["settings"]["model_name"]) == (0, str(folder))
    assert texts(predictions) == texts(run(tmp_path, folder, path, out="whole")[1])


def test_model_name_that_does_not_match(tmp_path, folder, capsys):
    """Fault: --model_name is ignored where the folder has its own config, so a mix-up goes unseen."""
    two_layers = tmp_path / "two"
    tiny_gpt2(layers=2).save_pretrained(two_layers)
    byte_tokenizer().save_pretrained(two_layers)
    path = write_news(tmp_path / "news.csv", 2)
    assert run(tmp_path, folder, path, "--model_name", str(two_layers))[0] == 2
    line = error_line(capsys)
    assert all(word in line for word in ["num_hidden_layers", "is 1", "has 2", str(two_layers)])
    assert run(tmp_path, folder, path, "--model_name", str(folder))[0] == 0


# -- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path, folder):
    """Output of a run that went well, as bytes by file name."""
    assert run(tmp_path, folder, write_news(tmp_path / "news.csv"))[0] == 0
    return content(tmp_path / "out")


def content(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_refused_run_changes_nothing(tmp_path, folder, earlier, capsys):
    """Fault: outputs are opened or deleted before the inputs are known to be good."""
    news = tmp_path / "news.csv"
    no_weights = tmp_path / "no_weights"
    shutil.copytree(folder, no_weights, ignore=lambda *_: ["model.safetensors"])
    for model_path, csv_path in [(folder, news_with_a_bad_row(tmp_path)), (folder, tmp_path / "absent.csv"),
                                 (tmp_path / "absent", news), (no_weights, news), (tmp_path / "absent.pt", news)]:
        flags = ["--model_name", str(folder)] if str(model_path).endswith(".pt") else []
        assert run(tmp_path, model_path, csv_path, *flags)[0] == 2
        assert "absent" in error_line(capsys) or model_path != tmp_path / "absent"
        assert content(tmp_path / "out") == earlier


def test_output_dir_that_is_a_file(tmp_path, folder, capsys):
    """Fault: the work of hours is lost because the folder is tried only at the end, or a traceback."""
    (tmp_path / "out").write_text("mine")
    path = write_news(tmp_path / "news.csv", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_table, "predict", lambda *_: pytest.fail("decoded first"))
        arguments = ["--csv_path", str(path), "--model_path", str(folder), "--output_dir", str(tmp_path / "out")]
        assert validate_model.main(arguments) == 2
    line = error_line(capsys)
    assert "--output_dir" in line and str(tmp_path / "out") in line
    assert (tmp_path / "out").read_text() == "mine"
