"""What a file of which no row can be used seems to be, by how its first row begins: a hint for whoever named it."""

from __future__ import annotations

PATH, TYPE = "dataset_details.dataset_path", "dataset_details.dataset_type"
# U+FFFD stands for a byte that isn't UTF-8.
BEGINNINGS = (
    ("[", TYPE, "It begins as a JSON array does: that is dataset_type json."),
    ("PAR1", TYPE, "It is a Parquet file: that is dataset_type parquet."),
    ("PK\x03\x04", TYPE, "It is a zip archive: unpack it; dataset_type zip is for images."),
    ("\x1f\N{REPLACEMENT CHARACTER}\x08", PATH, "It is compressed by gzip: its name must end in .jsonl.gz."),
    ("(\N{REPLACEMENT CHARACTER}/\N{REPLACEMENT CHARACTER}", PATH, "It is compressed by zstd: its name must end in .jsonl.zst."),
    ("\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}", PATH, "It seems to be UTF-16: write it as UTF-8."),
)


def mistaken_for(excerpt: str, reason: str, dataset_type: str) -> tuple[str, str] | None:
    """What to mend of a JSONL file, as a sentence, and the field that it is about; None where the rows themselves are at fault.

    `excerpt` is how its first row begins, `reason` why that can't be used.
    """
    if dataset_type != "jsonl":
        return None
    for begins, field, sentence in BEGINNINGS:
        if excerpt.lstrip(" \t").startswith(begins):
            return sentence, field
    if excerpt.strip() == "{":
        return "Its objects go over several lines: write each on one.", PATH
    if reason.startswith("not JSON") and not excerpt.lstrip().startswith("{"):
        return "Rows are JSON objects, one on each line: CSV and other text isn't read.", PATH
    return None
