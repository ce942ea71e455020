"""Texts of strangers that a terminal would obey, a reader would misread, or a spreadsheet program would run."""

import contextlib
import csv
import io
import json
from pathlib import Path

import torch

import train
import validate_model
from data import cnn_dailymail, demo_news
from data.prompts import PromptFormat
from data.token_cache import open_token_table
from tests.conftest import byte_tokenizer, tiny_gpt2, write_rows
from tests.faults.hostile_attack import Attack
from tests.faults.hostile_models import edit
from tests.faults.hostile_pickles import ROWS, checkpoint, model_folder, write_manifest
from utils import compare
from utils.run_log import RunLog, progress_bar

# Title of the terminal, its screen cleared, start of the line, text from right to left, zero width, a second form of
# ESC [, a line separator.
UGLY = "\x1b]0;owned\x07\x1b[2J\r\u202egood\u2066\u200b\x9b31m\u2028"
CELL = UGLY.replace("\r", "")
ESCAPED = UGLY.encode("unicode_escape").decode()


def shown(main, *arguments, code: int = 2) -> str:
    """What a script prints, on both streams; asserts its exit code and that a terminal would show every sign."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            found = main(list(map(str, arguments)))
        except SystemExit as end:
            found = end.code
    text = output.getvalue() + errors.getvalue()
    assert found == code, text
    assert_plain(text)
    return text


def assert_plain(text: str) -> None:
    strange = {sign for sign in text if not sign.isprintable() and sign != "\n"}
    assert not strange, ascii(text)


def validate(folder: Path, csv_path: Path, *more, model="lead-3", code: int = 2) -> str:
    return shown(validate_model.main, "--csv_path", csv_path, "--model_path", model, "--output_dir", folder / "out",
                 "--device_id", "-1", *more, code=code)


def rows_with(**cells) -> list[dict]:
    return [ROWS[0], {**ROWS[1], **cells}]


# -- messages --------------------------------------------------------------------------------------------------


def header(folder: Path) -> None:
    assert "\\x1b]0;owned" in validate(folder, write_rows(folder / "rows.csv", [{UGLY: "1", "article": "a"}]))


def row_id(folder: Path) -> None:
    path = write_rows(folder / "rows.csv", rows_with(id=UGLY, article=""))
    assert "\\x1b]0;owned" in validate(folder, path)
    assert "skipped: " in validate(folder, path, "--on_bad_row", "skip", code=0)


def file_names(folder: Path) -> None:
    path = write_rows(folder / f"{UGLY}.csv", ROWS)
    validate(folder, path)
    shown(cnn_dailymail.main, "--from_csv", path, "--output_dir", folder / UGLY, "--fraction", "1", code=0)
    shown(cnn_dailymail.main, "--from_csv", folder / UGLY / "none", "--output_dir", folder / "x", code=1)
    shown(demo_news.main, "--output_dir", folder / UGLY)


def arguments(folder: Path) -> None:
    validate(folder, folder / "x.csv", f"--{UGLY}")
    validate(folder, folder / "x.csv", "--columns", UGLY)
    shown(train.main, "--set", f"{UGLY}=1")
    shown(cnn_dailymail.main, f"--{UGLY}")
    shown(demo_news.main, f"--{UGLY}")
    shown(compare.main, f"--{UGLY}")


def config_file(folder: Path) -> None:
    for number, values in enumerate(({UGLY: 1}, {"trainer_kwargs": {"device": UGLY}}, {"model_arch": {UGLY: {UGLY: 1}}},
                                     {"dataset_kwargs": {"columns": {UGLY: UGLY}}})):
        path = folder / f"{number}{UGLY}.json"
        path.write_text(json.dumps(values))
        shown(train.main, "--config", path)
        path.write_text(json.dumps(values)[:-2])
        shown(train.main, "--config", path)


def model_metadata(folder: Path) -> None:
    model, path = model_folder(folder), write_rows(folder / "rows.csv", ROWS)
    for values in ({"model_type": UGLY}, {"model_type": "gpt2", "activation_function": f"{UGLY}\nfine"},
                   {"activation_function": "gelu", "prompt_template": [UGLY]}):
        edit(model / "config.json", **values)
        text = validate(folder, path, model=model)
        assert len([line for line in text.splitlines() if "error" in line]) == 1
    (model / "config.json").write_text(f'{{"{ESCAPED}": "')
    validate(folder, path, model=model)


def weight_names(folder: Path) -> None:
    model_folder(folder)
    torch.save({**tiny_gpt2().state_dict(), f"{UGLY}\nall is well": torch.ones(1)}, folder / "old.pt")
    text = validate(folder, write_rows(folder / "rows.csv", ROWS), "--model_name", folder / "model",
                    model=folder / "old.pt")
    assert "1 unexpected (\\x1b]0;owned" in text and "error: all" not in text


def checkpoint_metadata(folder: Path) -> None:
    step, path = checkpoint(folder), write_rows(folder / "rows.csv", ROWS)
    for name, values in (("manifest.json", {"files": {UGLY: {"bytes": 1, "sha256": UGLY}}}),
                         ("manifest.json", {"format_version": UGLY}), ("state.json", {"run_id": UGLY * 1000})):
        edit(step / "trainer_state" / name, **values)
        if name == "manifest.json":
            write_manifest(step, json.loads((step / "trainer_state" / name).read_text()))
        validate(folder, path, model=step)
        shown(train.main, "--set", f"trainer_kwargs.resume_from={step}", "--set",
              f"trainer_kwargs.output_dir={folder / 'run2'}")


def traceback(folder: Path) -> None:
    text = validate(folder, write_rows(folder / "rows.csv", [{UGLY: "1", "article": "a"}]), "--debug")
    assert "Traceback" in text


MESSAGES = [
    Attack("a CSV's header", header), Attack("an id of a bad row", row_id), Attack("names of files", file_names),
    Attack("arguments", arguments), Attack("keys and values of a config", config_file),
    Attack("a model's config.json", model_metadata), Attack("names of weights in a .pt file", weight_names),
    Attack("a checkpoint's manifest and state", checkpoint_metadata), Attack("the traceback of --debug", traceback),
]


# -- notices and progress --------------------------------------------------------------------------------------


def notices(folder: Path) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        RunLog(folder).say(f"{UGLY}\nsecond line{'x' * 10_000_000}")
        with progress_bar(f"tokenising {UGLY}", 1, "row") as bar:
            bar.update()
    text = errors.getvalue()
    assert "\x1b]" not in text and "\u202e" not in text and "\x9b" not in text and len(text) < 5000
    assert "\nsecond" not in text


def names_of_rows(folder: Path) -> None:
    """What a message about a row that is not finite says of it."""
    path = write_rows(folder / "rows.csv", rows_with(id=CELL * 200))
    table = open_token_table(path, PromptFormat(byte_tokenizer(), max_length=64), folder / "cache")
    name = table.names([1])[0]
    assert_plain(name)
    assert name.endswith("(row 2)") and len(name) < 1000


NOTICES = [Attack("notices and progress bars", notices), Attack("ids of rows in notices", names_of_rows)]


# -- results ---------------------------------------------------------------------------------------------------


def refuse_constant(name: str):
    raise AssertionError(name)


def predictions(folder: Path) -> None:
    """Cells and a model's words in predictions.json: strict JSON that can be shown, with the same texts."""
    rows = rows_with(id=CELL, article=f"a {CELL}b. NaN", highlights=f"h {CELL}", other=f"=1+1 {CELL}")
    validate(folder, write_rows(folder / "rows.csv", [{**ROWS[0], "other": "x"}, rows[1]]), code=0)
    text = (folder / "out/predictions.json").read_text()
    assert_plain(text)
    found = json.loads(text, parse_constant=refuse_constant)[1]
    expected = {"id": "id", "article": "article", "target_highlight": "highlights", "other": "other"}
    assert {key: found[key] for key in expected} == {key: rows[1][column] for key, column in expected.items()}


def scored_folder(folder: Path, name: str, **settings) -> Path:
    """A folder of validate_model.py, its settings changed and its seal broken off, as a stranger would."""
    path = write_rows(folder / "rows.csv", ROWS)
    shown(validate_model.main, "--csv_path", path, "--model_path", "lead-3", "--output_dir", folder / name,
          "--device_id", "-1", code=0)
    scores = json.loads((folder / name / "scores.json").read_text())
    scores.pop("sha256", None)
    scores["settings"] |= settings
    (folder / name / "scores.json").write_text(json.dumps(scores))
    return folder / name


def table(folder: Path) -> None:
    place = scored_folder(folder, "a", csv_path=f"/x/{UGLY}.csv", model_path=f"{UGLY}/model_checkpoints/{UGLY}")
    other = scored_folder(folder, "b", csv_path=f"/x/{UGLY}{UGLY}.csv")
    for form in ("text", "csv", "json"):
        shown(compare.main, f"{UGLY}={place}", other, "--format", form, "--baseline", "b", code=0)
    shown(compare.main, f"{UGLY}={place}", other, "--baseline", UGLY * 2)


def spreadsheet(folder: Path) -> None:
    """Names that are formulas become texts; numbers stay numbers."""
    place = scored_folder(folder, "a", csv_path="/x/=1+1.csv")
    text = shown(compare.main, *(f" {name}={place}" for name in ("+1", "-1", "@SUM(A1)", "－1", "plain")), "--format",
                 "csv", code=0)
    header_row, *table_rows = csv.reader(io.StringIO(text))
    assert [row[0] for row in table_rows] == ["'+1", "'-1", "'@SUM(A1)", "'－1", "plain"]
    assert {row[1] for row in table_rows} == {"'=1+1"}
    for row in table_rows:
        for name, cell in zip(header_row[2:], row[2:], strict=True):
            assert cell == "" or float(cell) is not None, name


RESULTS = [
    Attack("cells of a CSV in predictions.json", predictions), Attack("names in a table of scores", table),
    Attack("names that are formulas in a CSV of scores", spreadsheet),
]
ATTACKS = [*MESSAGES, *NOTICES, *RESULTS]
