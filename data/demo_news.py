"""Made-up news with highlights, for a demo that needs neither hub nor GPU.

    python -m data.demo_news --output_dir data/demo --seed 7

writes eight CSV files (`id, article, highlights, category, facts`), a byte-level BPE tokenizer trained on the
teacher's texts, and `demo.json`, which records the settings. The same settings give the same bytes.

Highlights are three sentences joined by newlines, as in CNN/DailyMail. `facts` is a JSON list of the slot values that
the highlights hold; `category` is the kind of event.
"""

import argparse
import csv
import hashlib
import json
import random
import re
import sys
import tempfile
from pathlib import Path

from data.demo_templates import EVENTS, GENERIC, POOLS

VERSION = 1  # of the generator and its templates: raise it when the same settings give other rows
END_OF_TEXT = "<|endoftext|>"
SIZES = {  # rows of each split
    "teacher_short": 3000,
    "teacher": 3000,
    "student_short": 1000,
    "student": 1000,
    "validation": 200,
    "test": 200,
}
COLUMNS = ("id", "article", "highlights", "category", "facts")
VALUES_OF_NO_FACT = {f"other_{pool}": pool for pool in ("place", "person", "firm", "number", "day")}


def draw_value(rng, pool, used):
    """A value of the pool that has no word in `used`; its words are added to the set `used`."""
    if pool == "person":
        return f"{draw_value(rng, 'first', used)} {draw_value(rng, 'last', used)}"
    value = rng.choice([word for word in POOLS[pool] if word not in used])
    used.add(value)
    return value


def draw_slots(rng, event, used):
    """Values for the slots of the event's key facts: {slot name: value}, all different."""
    return {slot: draw_value(rng, pool, used) for slot, pool in event.slots.items()}


def fill_distractor(rng, template, used):
    """The distractor sentence with competing values, none of them in `used`."""
    values = {slot: draw_value(rng, pool, used) for slot, pool in VALUES_OF_NO_FACT.items() if f"{{{slot}}}" in template}
    return template.format(**values)


def write_highlights(rng, event, slots):
    """Three lines, one for each key fact."""
    return "\n".join(rng.choice(wordings).format(**slots) for wordings in event.highlights)


def write_article(rng, event, slots, used, short):
    """One paragraph. Key fact 1 comes first or, in half of the full articles, second after a distractor.

    short: hold the three key facts and nothing else. Full articles add 2-5 distractors of the event and 0-2 generic.
    """
    first, *rest = (rng.choice(wordings).format(**slots) for wordings in event.facts)
    before = []
    if not short:
        of_event = rng.sample(event.distractors, len(event.distractors))
        if rng.random() < 0.5:
            before = [fill_distractor(rng, of_event.pop(), used)]
        distractors = of_event[: rng.randint(2, 5)] + rng.sample(GENERIC, rng.randint(0, 2))
        rest += [fill_distractor(rng, template, used) for template in distractors]
    rng.shuffle(rest)
    return " ".join([*before, first, *rest])


def make_rows(split, size, seed, seen):
    """`size` rows of a split, the event kinds in turn.

    seen: set of (kind, slot values) that earlier splits hold. None of them is used again; the new ones are added.
    Returns dicts with the keys of COLUMNS.
    """
    rng = random.Random(f"{split}/{seed}")  # a string seed is hashed with SHA-512: the same in every process
    kinds = list(EVENTS)
    rows = []
    while len(rows) < size:
        kind = kinds[len(rows) % len(kinds)]
        event, used = EVENTS[kind], set()
        slots = draw_slots(rng, event, used)
        content = (kind, *slots.values())
        if content in seen:
            continue
        seen.add(content)
        rows.append({
            "id": f"{split}-{len(rows):05d}",
            "article": write_article(rng, event, slots, used, short=split.endswith("_short")),
            "highlights": write_highlights(rng, event, slots),
            "category": kind,
            "facts": json.dumps(list(slots.values())),
        })
    return rows


def add_noise(rows, share, seed):
    """Copies of the rows in which a share of the highlights tells wrong facts, as scraped references often do.

    The wrong facts are of the same kind of event and none of them occurs in the article. `facts` follows the
    highlights. A further column `noisy` is 1 for these rows and 0 for the others.
    """
    rng = random.Random(f"noise/{seed}")
    chosen = set(rng.sample(range(len(rows)), round(share * len(rows))))
    noisy_rows = []
    for index, row in enumerate(rows):
        row = {**row, "noisy": int(index in chosen)}
        if row["noisy"]:
            event = EVENTS[row["category"]]
            slots = draw_slots(rng, event, used=set(re.findall(r"\w+", row["article"])))
            row.update(highlights=write_highlights(rng, event, slots), facts=json.dumps(list(slots.values())))
        noisy_rows.append(row)
    return noisy_rows


def generate(sizes=None, seed=7, test_seed=None, noisy_share=0.25):
    """All tables of the demo: {name: rows}, in the order in which they are written.

    sizes: {split: number of rows}; a split left out has its size of SIZES. test_seed: seed of the test split, the
    only table it changes; None is `seed`. noisy_share: of the highlights in the `_noisy` tables, 0 to 1.
    No two rows share their kind and key facts, except a `_noisy` table and the clean one it repeats.
    Raises ValueError for an unknown split, a size below 1 or a share outside 0 to 1.
    """
    sizes = {**SIZES, **(sizes or {})}
    for split, size in sizes.items():
        if split not in SIZES:
            raise ValueError(f"unknown split '{split}': expected one of {', '.join(SIZES)}")
        if size < 1:
            raise ValueError(f"{split} rows must be 1 or more, not {size}")
    if not 0 <= noisy_share <= 1:
        raise ValueError(f"noisy_share must be between 0 and 1, not {noisy_share}")
    tables, seen = {}, set()
    for split in SIZES:  # the test split is last: its seed changes no other table
        split_seed = test_seed if split == "test" and test_seed is not None else seed
        tables[split] = make_rows(split, sizes[split], split_seed, seen)
        if split.startswith("student"):
            tables[f"{split}_noisy"] = add_noise(tables[split], noisy_share, f"{split}/{seed}")
    return tables


def train_tokenizer(texts, vocab_size=1536):
    """Byte-level BPE trained on the texts: a PreTrainedTokenizerFast of at most `vocab_size` tokens.

    `<|endoftext|>` is its only special token: beginning, end and unknown. Texts of 256 tokens at most are expected.
    Raises ValueError where `vocab_size` cannot hold the 256 bytes and the special token.
    """
    # Imported here because it takes seconds, and a folder that is reused needs none of it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be 257 or more, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def teacher_texts(tables):
    """What the tokenizer learns from: articles and highlights of both teacher tables."""
    rows = tables["teacher_short"] + tables["teacher"]
    return [row[column] for row in rows for column in ("article", "highlights")]


def write_table(path, rows):
    """The rows as UTF-8 CSV with LF line ends and the first row's keys as header."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def file_digests(folder):
    """{path inside the folder: SHA-256} of every file but demo.json."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "demo.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def read_record(folder):
    """The folder's demo.json, or {} where there is none or it cannot be read."""
    try:
        record = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_complete(folder, settings):
    """Whether the folder holds just the files that these settings gave, unchanged."""
    record = read_record(folder)
    return record.get("settings") == settings and record.get("sha256") == file_digests(folder)


def check_replaceable(folder):
    """Raises ValueError if replacing the folder would lose files that this module did not write."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    foreign = sorted(set(file_digests(folder)) - set(read_record(folder).get("sha256", {})))
    if foreign:
        raise ValueError(f"{folder} holds {foreign[0]}, which is not part of the demo: choose another --output_dir")


def write_folder(folder, settings):
    """Generate everything and put it in place of `folder` in one step, so that no half-made folder is ever seen.

    settings: keyword arguments of `generate`, with `vocab_size` and `version`. Returns one line per file.
    """
    tables = generate(settings["sizes"], settings["seed"], settings["test_seed"], settings["noisy_share"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        lines = []
        for name, rows in tables.items():
            write_table(new / f"{name}.csv", rows)
            words = sum(len(row["article"].split()) for row in rows) / len(rows)
            noisy = f", {sum(row['noisy'] for row in rows)} noisy" if "noisy" in rows[0] else ""
            lines.append(f"{name}.csv: {len(rows)} rows, {words:.0f} words an article{noisy}")
        tokenizer = train_tokenizer(teacher_texts(tables), settings["vocab_size"])
        tokenizer.save_pretrained(new / "tokenizer")
        lines.append(f"tokenizer/: {len(tokenizer)} tokens")
        record = {"settings": settings, "sha256": file_digests(new)}
        (new / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        lines.append("demo.json: the settings")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    return lines


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"demo_news: error: {message}\n")


def parse_arguments(arguments=None):
    """(output folder, settings) from the command line."""
    parser = OneLineParser(prog="python -m data.demo_news", description="Write the demo's made-up news.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--test_seed", type=int, help="seed of test.csv alone; default: that of --seed")
    parser.add_argument("--noisy_share", type=float, default=0.25, help="of the *_noisy highlights; default: %(default)s")
    parser.add_argument("--vocab_size", type=int, default=1536, help="of the tokenizer; default: %(default)s")
    for split, size in SIZES.items():
        parser.add_argument(f"--{split}_rows", type=int, default=size, help="default: %(default)s")
    options = parser.parse_args(arguments)
    settings = {
        "version": VERSION,
        "seed": options.seed,
        "test_seed": options.seed if options.test_seed is None else options.test_seed,
        "noisy_share": options.noisy_share,
        "vocab_size": options.vocab_size,
        "sizes": {split: getattr(options, f"{split}_rows") for split in SIZES},
    }
    return options.output_dir, settings


def main(arguments=None):
    """Runs the command and returns its exit code: 0, 1 for a file system error, 2 for a usage error."""
    output_dir, settings = parse_arguments(arguments)
    folder = output_dir.resolve()  # so that a link to a folder stays a link
    try:
        if is_complete(folder, settings):
            print(f"{output_dir}: already complete with these settings, reused")
            return 0
        check_replaceable(folder)
        lines = write_folder(folder, settings)
    except ValueError as error:
        print(f"demo_news: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"demo_news: error: cannot write {output_dir}: {error}", file=sys.stderr)
        return 1
    for line in lines:
        print(f"{output_dir}/{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
