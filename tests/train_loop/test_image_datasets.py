"""Datasets of images from a zip to what a worker reads: rows, their pictures, and no more bytes than they need."""

import base64
import json
import shutil

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from tests.train_loop.zips import FIELDS, Chat, picture, row, zipped
from train_loop.data import gallery, parts
from train_loop.data.cache import fetch, publish
from train_loop.data.image_tokens import ImageTokens
from train_loop.data.prepare import preparation_key, prepare_local, prepared_before
from train_loop.data.shards import PreparedDataset, ShardSet, fetch_shards
from train_loop.data.sources import Credentials, dataset_filesystem, filesystem_for, find_files
from train_loop.data.stored_file import StoredFile
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import DatasetError
from train_loop.model.processor import load_processor
from train_loop.model.tokenizer import load_tokenizer, tokenizer_hash
from train_loop.spec import JobSpec

LOCAL = LocalFileSystem()
TINY_VLM = "tuneyard/tiny-random-vlm"
REJECTS = {"dataset_config.preprocessing.max_reject_ratio": 1.0}


@pytest.fixture
def spec_of(local_job, tmp_path):
    """The job of a dataset, which is put into this test's folder where it is bytes."""

    def make(dataset, changes=None):
        if isinstance(dataset, bytes):
            (tmp_path / "it.zip").write_bytes(dataset)
            dataset = str(tmp_path / "it.zip")
        at = {"dataset_details.dataset_path": dataset}
        return JobSpec.model_validate(local_job(FIELDS | at | REJECTS | (changes or {})))

    return make


def prepared_in(spec, folder, chat=None, source=LOCAL):
    return prepare_local(spec, source, find_files(spec, source), LOCAL, str(folder), chat or Chat())


def seen(prepared, folder):
    """What workers see: of each row its source, conversation or tokens, and pictures."""
    shards = ShardSet(prepared, folder / "data")
    held = [int(i) for split in ("train", "eval") for i in shards.ids(split)]
    what = [shards.sample(i) if prepared.eager else shards.conversation(i) for i in held]
    if prepared.eager:
        what = [(s.input_ids.tolist(), s.labels.tolist(), s.images) for s in what]
    return [(shards.source(i), w, shards.pictures(i)) for i, w in zip(held, what, strict=True)]


def rejected(folder):
    return [(r["line"], r["reason"]) for r in map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())]


PICTURES = {f"{i}.png": picture(i, (4 + i, 3)) for i in range(10)}
MIXED = [
    row("0.png"),
    row(),
    row("1.png", "2.png"),
    row("none.png"),
    row("0.png", "0.png"),
    b"{\n",
    row("2.png", ask="Several <image> in it"),
    row("3.png", ask="<image><image>"),
    *(row(f"{i}.png") for i in range(4, 10)),
]


@pytest.mark.parametrize("lazy", [True, False])
def test_rows_and_pictures_are_the_same_whatever_the_parts(spec_of, tmp_path, monkeypatch, lazy):
    spec = spec_of(zipped(MIXED, PICTURES), {"dataset_config.preprocessing.lazy_tokenize": lazy})
    found = []
    for size in (1 << 20, 300, 150):
        monkeypatch.setattr(parts, "ZIPPED_RANGE_BYTES", size)
        monkeypatch.setattr(gallery, "BATCH_BYTES", size // 3)
        run = tmp_path / str(size)
        prepared = prepared_in(spec, run)
        assert PreparedDataset.from_json((run / "data/index.json").read_text()) == prepared
        assert (len(prepared.shards) > 3) is (size < 1000)
        found.append((seen(prepared, run), rejected(run), prepared.counts))
    assert found[0] == found[1] == found[2]
    rows, reasons, _ = found[0]
    assert [line for (_, line), _, _ in sorted(rows, key=lambda r: r[0])] == [1, 2, 3, 5, 7, *range(9, 15)]
    shown = {line: [p.data for p in pictures] for (_, line), _, pictures in rows}
    assert [shown[1], shown[2], shown[3], shown[5]] == [
        [PICTURES["0.png"]],
        [],
        [PICTURES["1.png"], PICTURES["2.png"]],
        [PICTURES["0.png"]] * 2,
    ]
    assert [line for line, _ in reasons] == [4, 6, 8]
    assert [reason.partition(":")[0] for _, reason in reasons] == [
        "image none.png isn't in the archive",
        "not JSON",
        "1 images for 2 placeholders (<image>)",
    ]


def test_an_image_is_kept_once_in_a_block_whatever_it_is_called(spec_of, tmp_path):
    same = f"data:image/png;base64,{base64.b64encode(PICTURES['0.png']).decode()}"
    prepared = prepared_in(
        spec_of(zipped([row("0.png"), row("copy.png"), row(same, "1.png")], PICTURES | {"copy.png": PICTURES["0.png"]})), tmp_path
    )
    (shard,) = prepared.shards
    shards = ShardSet(prepared, tmp_path / "data")
    assert [len(shards.pictures(i)) for i in range(3)] == [1, 1, 2]
    assert shards._images[0].num_rows == 2
    assert prepared.paths == ["shard-00000-00000.arrow", "images-00000-00000.arrow"] == [shard.path, shard.images]


def test_rows_hold_no_bytes_of_images(spec_of, tmp_path):
    whole = base64.b64encode(PICTURES["0.png"]).decode()
    prepared = prepared_in(spec_of(zipped([row(f"data:image/png;base64,{whole}")])), tmp_path)
    ((_, conversation, (shown,)),) = seen(prepared, tmp_path)
    assert conversation["images"] == ["data:image/png;base64"]
    assert conversation["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert shown.data == PICTURES["0.png"]
    assert whole[:40].encode() not in (tmp_path / "data/shard-00000-00000.arrow").read_bytes()


def test_of_rows_that_are_cut_off_only_what_is_left_is_kept(spec_of, tmp_path):
    spec = spec_of(
        zipped([row("0.png", "1.png", "2.png"), row("2.png")], PICTURES), {"dataset_config.preprocessing.lazy_tokenize": False}
    )
    prepared = prepared_in(spec, tmp_path, Chat(most=2))
    shown = {line: (tokens, pictures) for (_, line), tokens, pictures in seen(prepared, tmp_path)}
    (ids, _, images), pictures = shown[1]
    assert (ids, images) == ([1, 4003, 5003], (0, 1))
    assert [p.data for p in pictures] == [PICTURES["0.png"], PICTURES["1.png"]]
    assert [p.data for p in shown[2][1]] == [PICTURES["2.png"]]
    assert ShardSet(prepared, tmp_path / "data")._images[0].num_rows == 3


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("data:image/png,abc", "image data:image/png isn't base64"),
        ("data:image/png;base64,%%%", "image data:image/png;base64 isn't sound base64"),
        ("data:image/png;base64", "image data:image/png;base64 isn't base64"),
        ("data:image/png;base64,", "image data:image/png;base64 is empty"),
        ("DATA:image/png;base64,AAAA", "image DATA:image/png;base64 is no JPEG, PNG"),
        ("x" * 300, "image " + "x" * 100 + "… isn't in the archive"),
    ],
)
def test_what_a_row_calls_an_image_is_shown_in_short(spec_of, tmp_path, reference, reason):
    prepared_in(spec_of(zipped([row(reference), row()])), tmp_path)
    ((line, said),) = rejected(tmp_path)
    assert line == 1
    assert said.startswith(reason)


def test_images_of_a_row_that_are_too_large_together_cost_the_row(spec_of, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "MAX_ROW_BYTES", 2 * len(PICTURES["0.png"]))
    prepared_in(spec_of(zipped([row("0.png"), row("1.png", "2.png", "3.png")], PICTURES)), tmp_path)
    assert rejected(tmp_path) == [(2, "its images are larger than 0 MiB together")]


def test_pictures_are_scaled_down_to_max_pixels(spec_of, tmp_path):
    data = zipped([row("a.png")], {"a.png": picture(0, (100, 50))})
    specs = [spec_of(data, {"dataset_config.preprocessing.max_pixels": n}) for n in (None, 1024)]
    sizes = [
        [(p.width, p.height) for p in seen(prepared_in(s, tmp_path / str(i)), tmp_path / str(i))[0][2]]
        for i, s in enumerate(specs)
    ]
    assert sizes == [[(100, 50)], [(45, 22)]]
    assert len({preparation_key(s, find_files(s, LOCAL)) for s in specs}) == 2


def test_several_zips_and_one_to_evaluate_on(spec_of, tmp_path):
    (tmp_path / "ds").mkdir()
    for name in "abc":
        data = zipped([row("a.png", answer=f"{name} {i}") for i in range(2)], {"a.png": picture(ord(name))})
        (tmp_path / f"ds/{name}.zip").write_bytes(data)
    split = {"dataset_config.split": {"type": "file", "eval_path": f"{tmp_path}/ds/c.zip"}}
    prepared = prepared_in(spec_of(f"{tmp_path}/ds/", split), tmp_path / "run")
    assert prepared.counts == {"train": 4, "eval": 2}
    rows = seen(prepared, tmp_path / "run")
    assert [(uri[-5:], line, c["messages"][-1]["content"]) for (uri, line), c, _ in rows] == [
        (f"{name}.zip", i + 1, f"{name} {i}") for name in "abc" for i in range(2)
    ]
    assert all(p.data == picture(ord(uri[-5])) for (uri, _), _, (p,) in rows)
    (tmp_path / "ds/b.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match=r"ds/b\.zip can't be read as a zip"):
        prepared_in(spec_of(f"{tmp_path}/ds/", split), tmp_path / "run")


@pytest.fixture(scope="module")
def bucket(s3):
    client = s3.client()
    for name in ("outside.png", "no-image.png"):
        client.put_object(Bucket="tuneyard", Key=f"images/{name}", Body=picture(99) if name == "outside.png" else b"no")
    return s3


def in_s3(bucket, data, key="ds/it.zip"):
    bucket.client().put_object(Bucket="tuneyard", Key=key, Body=data)
    return f"s3://tuneyard/{key}", {"dataset_details.source_type": "s3", "dataset_details.secret_id": "x"}


def keys_of(bucket):
    return Credentials(bucket.access_key_id, bucket.secret_access_key, endpoint_url=bucket.endpoint_url)


def test_of_a_zip_in_s3_only_what_rows_name_is_read(bucket, spec_of, tmp_path, monkeypatch):
    """Forty images in a row and one alone, of three hundred: their bytes, the directory, and some read ahead."""
    images = {f"{i:03}.png": picture(i, (140, 140)) for i in range(300)}
    named = [f"{i:03}.png" for i in (7, *range(100, 140), 290)]
    data = zipped([row(name) for name in named], images)
    uri, where = in_s3(bucket, data)
    read = []

    class Counted(StoredFile):
        def read_at(self, offset, size):
            found = super().read_at(offset, size)
            read.append(len(found))
            return found

    monkeypatch.setattr("train_loop.data.archive.StoredFile", Counted)
    spec = spec_of(uri, where)
    source = dataset_filesystem(spec.dataset_details, keys_of(bucket))
    prepared = prepared_in(spec, tmp_path, source=source)
    assert prepared.num_rows == len(named)
    wanted = sum(len(images[name]) for name in named)
    assert len(data) > 15 << 20
    assert sum(read) < wanted + (3 << 20)
    assert len(read) < 16
    shown = {line: p.data for (_, line), _, (p,) in seen(prepared, tmp_path)}
    assert [shown[i + 1] for i in range(len(named))] == [images[name] for name in named]


def test_objects_that_rows_name_are_opened_by_the_datasets_keys(bucket, spec_of, tmp_path):
    rows = [
        row("s3://tuneyard/images/outside.png"),
        row("s3://tuneyard/images/none.png"),
        row("s3://tuneyard/images/no-image.png"),
    ]
    rows += [row("s3://no-such-bucket/a.png"), row("gs://tuneyard/a.png"), row("s3://"), row("s3://tuneyard")]
    uri, where = in_s3(bucket, zipped(rows))
    spec = spec_of(uri, where)
    prepared = prepared_in(spec, tmp_path, source=dataset_filesystem(spec.dataset_details, keys_of(bucket)))
    assert [p.data for _, _, (p,) in seen(prepared, tmp_path)] == [picture(99)]
    assert [(line, reason.partition(" ")[2].partition(" ")[2].partition(":")[0]) for line, reason in rejected(tmp_path)][:4] == [
        (2, "isn't there"),
        (3, "is no JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (4, "isn't there"),
        (5, "isn't fetched by gs"),
    ]
    assert [line for line, _ in rejected(tmp_path)] == [2, 3, 4, 5, 6, 7]


def test_pictures_travel_with_their_rows_through_storage_and_the_cache(bucket, spec_of, tmp_path):
    spec = spec_of(zipped(MIXED, PICTURES))
    storage, root = filesystem_for("s3://tuneyard/images-cache", keys_of(bucket))
    files = find_files(spec, LOCAL)
    made = prepare_local(spec, LOCAL, files, storage, f"{root}/org/one", Chat())
    publish(storage, f"{root}/org/one", "key", made)
    assert fetch(storage, f"{root}/org/two", "key") == made
    assert prepared_before(spec, files, storage, f"{root}/org/two") == made
    here = prepared_in(spec, tmp_path / "here")
    for run in ("one", "two"):
        folder = fetch_shards(made, storage, f"{root}/org/{run}/data", tmp_path / run / "data").parent
        assert seen(made, folder) == seen(here, tmp_path / "here")
    (image_file,) = [s.images for s in made.shards]
    storage.delete_file(f"{root}/org/two/data/{image_file}")
    assert prepared_before(spec, files, storage, f"{root}/org/two") is None
    storage.delete_file(f"{root}/org/data-cache/key/{image_file}")
    assert fetch(storage, f"{root}/org/three", "key") is None


def test_an_outage_between_images_is_waited_out(spec_of, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ZIPPED_RANGE_BYTES", 300)
    monkeypatch.setattr("train_loop.data.archive.END_BYTES", 10)
    monkeypatch.setattr("train_loop.data.archive.AHEAD_BYTES", 10)
    spec = spec_of(zipped(MIXED, PICTURES))
    undisturbed = prepared_in(spec, tmp_path / "undisturbed")
    count = 0

    class Away(StoredFile):
        def read_at(self, offset, size):
            nonlocal count
            count += 1
            if count % 31 == 0:
                self.error = OSError("curlCode: 7, Couldn't connect to server")
                raise self.error
            return super().read_at(offset, size)

    monkeypatch.setattr("train_loop.data.archive.StoredFile", Away)
    assert prepared_in(spec, tmp_path / "away") == undisturbed
    assert count > 62
    assert seen(undisturbed, tmp_path / "away") == seen(undisturbed, tmp_path / "undisturbed")


def test_a_zip_with_another_image_is_another_dataset(bucket, spec_of, tmp_path):
    uri, where = in_s3(bucket, zipped([row("a.png")], {"a.png": picture(0)}), "ds/changed.zip")
    spec = spec_of(uri, where)
    source = dataset_filesystem(spec.dataset_details, keys_of(bucket))
    before, sha256 = preparation_key(spec, find_files(spec, source)), prepared_in(spec, tmp_path, source=source).sha256
    assert before == preparation_key(spec, find_files(spec, source))
    in_s3(bucket, zipped([row("a.png")], {"a.png": picture(1)}), "ds/changed.zip")
    assert preparation_key(spec, find_files(spec, source)) != before
    assert prepared_in(spec, tmp_path, source=source).sha256 != sha256


def test_rows_are_judged_and_tokenised_as_the_model_sees_their_pictures(spec_of, tmp_path, mirror):
    folder = mirror / TINY_VLM
    tokenizer = load_tokenizer(folder)
    images = ImageTokens(load_processor(folder, tokenizer))
    data = zipped(
        [row("a.png", answer="A cat."), row(answer="No cat."), row("line.png")],
        {"a.png": picture(0, (40, 30)), "line.png": picture(0, (200, 1))},
    )
    made = {}
    for lazy in (True, False):
        spec = spec_of(data, {"dataset_config.preprocessing.lazy_tokenize": lazy, "model_details.base_model": TINY_VLM})
        chat = ChatTokenizer.of(spec, tokenizer, images)
        prepared = prepared_in(spec, tmp_path / str(lazy), chat)
        shards = ShardSet(prepared, tmp_path / str(lazy) / "data")
        for i in range(prepared.num_rows):
            pictures = shards.pictures(i)
            sample = chat.encode(shards.conversation(i), [(p.width, p.height) for p in pictures]) if lazy else shards.sample(i)
            made[lazy, i] = sample.input_ids.tolist(), sample.labels.tolist(), sample.images, [p.data for p in pictures]
    assert all(made[True, i] == made[False, i] for i in range(3))
    ids, labels, shown, _ = made[True, 0]
    assert shown == (0,)
    assert ids.count(images.placeholder_id) == np.count_nonzero(images.expansion(40, 30).ids == images.placeholder_id) > 0
    assert {images.placeholder_id, -100} < {*ids, *labels}
    assert images.placeholder_id not in labels


def test_the_entry_in_the_cache_depends_on_how_the_processor_cuts_pictures(tmp_path, mirror):
    shutil.copytree(mirror / TINY_VLM, tmp_path / "model")
    before = tokenizer_hash(tmp_path / "model")
    settings = next(p for p in (tmp_path / "model").glob("*processor*.json"))
    settings.write_text(settings.read_text() + " ")
    assert tokenizer_hash(tmp_path / "model") != before
