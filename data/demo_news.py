"""Synthetic news with highlights, for a demo that needs neither hub nor GPU.

    python -m data.demo_news --output_dir data/demo --seed 7

writes eight CSV files (`id, article, highlights, category, facts`), a byte-level BPE tokenizer trained on the
teacher's texts, and `demo.json`, which records the settings. The same settings give the same bytes.

Highlights are three sentences joined by newlines, as in CNN/DailyMail. `facts` is a JSON list of the slot values that
the highlights hold; `category` is the kind of event. The sentences are in demo/templates.json.
"""

import argparse
import csv
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from data.articles import DataError

TEMPLATES = json.loads((Path(__file__).parent.parent / "demo/templates.json").read_text(encoding="utf-8"))
POOLS, EVENTS, GENERIC = TEMPLATES["pools"], TEMPLATES["events"], TEMPLATES["generic"]
VERSION = 1  # of the generator and its templates: raise it if the same settings give other rows
END_OF_TEXT = "<|endoftext|>"
SIZES = {  # rows of each split
    "teacher_short": 3000, "teacher": 3000, "student_short": 1000, "student": 1000, "validation": 200, "test": 200,
}
NOISY_SHARE = 0.25  # of the highlights in the `_noisy` tables
DISTRACTOR_SLOTS = {f"other_{pool}": pool for pool in ("place", "person", "firm", "number", "day")}

Row = dict[str, str | int]


def draw_value(rng: random.Random, pool: str, used: set[str]) -> str:
    """A value of the pool that has no word in `used`; its words are added to the set `used`."""
    if pool == "person":
        return f"{draw_value(rng, 'first', used)} {draw_value(rng, 'last', used)}"
    value = rng.choice([word for word in POOLS[pool] if word not in used])
    used.add(value)
    return value


def draw_unseen_slots(
    rng: random.Random, category: str, taken: Iterable[str], seen: set[tuple[str, ...]]
) -> tuple[dict[str, str], set[str]]:
    """({slot of the key facts: value}, all words used), without words of `taken`.

    seen: (category, values) of earlier rows, none of which is drawn again; the new one is added.
    """
    while True:
        used = set(taken)
        slots = {slot: draw_value(rng, pool, used) for slot, pool in EVENTS[category]["slots"].items()}
        content = (category, *slots.values())
        if content not in seen:
            seen.add(content)
            return slots, used


def fill_distractor(rng: random.Random, template: str, used: set[str]) -> str:
    """The distractor sentence with competing values, none of them in `used`."""
    slots = {slot: pool for slot, pool in DISTRACTOR_SLOTS.items() if f"{{{slot}}}" in template}
    return template.format(**{slot: draw_value(rng, pool, used) for slot, pool in slots.items()})


def write_highlights(rng: random.Random, category: str, slots: dict[str, str]) -> str:
    """Three lines, one per key fact."""
    return "\n".join(rng.choice(wordings).format(**slots) for wordings in EVENTS[category]["highlights"])


def write_article(rng: random.Random, category: str, slots: dict[str, str], used: set[str], short: bool) -> str:
    """One paragraph. Key fact 1 comes first or, in half of the full articles, second after a distractor.

    short: hold the three key facts and nothing else. Full articles add 2-5 distractors of the event and 0-2 generic.
    """
    first, *rest = (rng.choice(wordings).format(**slots) for wordings in EVENTS[category]["facts"])
    before = []
    if not short:
        of_event = rng.sample(EVENTS[category]["distractors"], len(EVENTS[category]["distractors"]))
        if rng.random() < 0.5:
            before = [fill_distractor(rng, of_event.pop(), used)]
        distractors = of_event[: rng.randint(2, 5)] + rng.sample(GENERIC, rng.randint(0, 2))
        rest += [fill_distractor(rng, template, used) for template in distractors]
    rng.shuffle(rest)
    return " ".join([*before, first, *rest])


def make_rows(split: str, size: int, seed: int, seen: set[tuple[str, ...]]) -> list[Row]:
    """`size` rows of a split, the event kinds in turn. seen: as in `draw_unseen_slots`, of all splits."""
    rng = random.Random(f"{split}/{seed}")  # a string seed is hashed with SHA-512: the same in every process
    rows = []
    for index, category in zip(range(size), itertools.cycle(EVENTS), strict=False):
        slots, used = draw_unseen_slots(rng, category, (), seen)
        rows.append({
            "id": f"{split}-{index:05d}",
            "article": write_article(rng, category, slots, used, short=split.endswith("_short")),
            "highlights": write_highlights(rng, category, slots),
            "category": category,
            "facts": json.dumps(list(slots.values())),
        })
    return rows


def add_noise(rows: list[Row], seed: str, seen: set[tuple[str, ...]]) -> list[Row]:
    """Copies of the rows in which NOISY_SHARE of the highlights state wrong facts, as scraped references often do.

    The wrong facts are of the same kind of event, and none of them occurs in the article. `facts` follows the
    highlights. A further column, `noisy`, is 1 for these rows and 0 for the others.
    """
    rng = random.Random(f"noise/{seed}")
    chosen = set(rng.sample(range(len(rows)), round(NOISY_SHARE * len(rows))))
    noisy_rows = [{**row, "noisy": int(index in chosen)} for index, row in enumerate(rows)]
    for row in noisy_rows:
        if row["noisy"]:
            slots, _ = draw_unseen_slots(rng, row["category"], re.findall(r"\w+", row["article"]), seen)
            row["highlights"] = write_highlights(rng, row["category"], slots)
            row["facts"] = json.dumps(list(slots.values()))
    return noisy_rows


def generate(sizes: dict[str, int], seed: int = 7, test_seed: int | None = None) -> dict[str, list[Row]]:
    """All tables of the demo: {name: rows}, in the order in which they are written.

    sizes: {split: number of rows}. test_seed: seed of the test split, the only table that it changes; None: `seed`.
    No two rows share their category and key facts, except the clean rows that a `_noisy` table repeats.
    """
    tables, seen = {}, set()
    for split in SIZES:  # the test split is last: its seed changes no other table
        split_seed = test_seed if split == "test" and test_seed is not None else seed
        tables[split] = make_rows(split, sizes[split], split_seed, seen)
        if split.startswith("student"):
            tables[f"{split}_noisy"] = add_noise(tables[split], f"{split}/{seed}", seen)
    return tables


def train_tokenizer(tables: dict[str, list[Row]], vocab_size: int = 1536):
    """Byte-level BPE trained on the teacher's tables: a PreTrainedTokenizerFast of at most `vocab_size` tokens.

    `<|endoftext|>` is its only special token: beginning, end and unknown. Texts of 256 tokens at most are expected.
    """
    # Imported here because it takes seconds, and reusing a folder needs none of it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = tables["teacher_short"] + tables["teacher"]
    texts = [row[column] for row in rows for column in ("article", "highlights")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False, model_max_length=256,
    )


def write_folder(folder: Path, seed: int, test_seed: int | None, vocab_size: int, max_rows: int | None) -> None:
    """Write the tables, the tokenizer and, when all are complete, the settings, unless all that is there already.

    Raises DataError if the folder has files of somebody else, and OSError.
    """
    sizes = {split: min(size, max_rows or size) for split, size in SIZES.items()}
    settings = {"version": VERSION, "seed": seed, "test_seed": seed if test_seed is None else test_seed,
                "noisy_share": NOISY_SHARE, "vocab_size": vocab_size, "sizes": sizes}
    record, text = folder / "demo.json", json.dumps({"settings": settings}, indent=2) + "\n"
    tables = generate(sizes, seed, test_seed)
    files = [*(folder / f"{name}.csv" for name in tables), folder / "tokenizer/tokenizer.json"]
    if record.exists() and record.read_text(encoding="utf-8") == text and all(path.is_file() for path in files):
        print(f"{folder}: already complete with these settings, reused")
        return
    if not record.exists() and folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} holds other files: choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text("{}\n", encoding="utf-8")  # the folder is ours, and not complete
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        words = sum(len(row["article"].split()) for row in rows) / len(rows)
        noisy = f", {sum(row['noisy'] for row in rows)} noisy" if "noisy" in rows[0] else ""
        print(f"{folder}/{name}.csv: {len(rows)} rows, {words:.0f} words an article{noisy}")
    tokenizer = train_tokenizer(tables, vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    print(f"{folder}/tokenizer/: {len(tokenizer)} tokens")
    record.write_text(text, encoding="utf-8")
    print(f"{record}: the settings")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m data.demo_news", description="Write the demo's synthetic news.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--test_seed", type=int, help="seed of test.csv alone; default: that of --seed")
    parser.add_argument("--vocab_size", type=int, default=1536, help="of the tokenizer; default: %(default)s")
    parser.add_argument("--max_rows", type=int, help="of each table; default: 3,000 of the teacher's, 1,000 of the "
                        "student's, 200 of the others")
    options = parser.parse_args(arguments)
    if options.max_rows is not None and options.max_rows < 1:
        parser.error(f"--max_rows must be 1 or more, not {options.max_rows}")
    try:
        write_folder(options.output_dir, options.seed, options.test_seed, options.vocab_size, options.max_rows)
    except (DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
