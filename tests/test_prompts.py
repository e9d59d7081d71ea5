from __future__ import annotations

import csv
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dancegrpo.errors import PromptError
from dancegrpo.group_sampler import GroupSampler
from dancegrpo.prompts import Prompt, open_prompts


def write(folder: Path, name: str, text: str | bytes) -> str:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(PromptError) as caught:
        open_prompts(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_file_gives_one_prompt_per_line_that_is_not_blank(tmp_path: Path) -> None:
    source = open_prompts(write(tmp_path, "p.txt", "\ufeffa cat\r\n\n  a dög, 狗 \n   \nlast"), negative="blurry")
    assert list(source) == [Prompt(0, "a cat", "blurry"), Prompt(1, "a dög, 狗", "blurry"), Prompt(2, "last", "blurry")]
    assert len(source) == 3


def test_index_beyond_the_end(tmp_path: Path) -> None:
    source = open_prompts(write(tmp_path, "p.txt", "a\nb\n"))
    for index in (2, -1):
        with pytest.raises(IndexError):
            source[index]


def test_jsonl_fields(tmp_path: Path) -> None:
    Image.new("RGB", (2, 3)).save(tmp_path / "first.png")
    rows = [
        {"caption": "one", "negative": "own", "image": "first.png", "metadata": {"tag": 1}, "include": ["cat"]},
        {"caption": "two", "negative": ""},
        {"caption": "three", "negative": None},
    ]
    path = write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, rows)))
    one, two, three = open_prompts(path, column="caption", negative="config's")
    assert one == Prompt(0, "one", "own", tmp_path / "first.png", {"include": ["cat"], "tag": 1})
    # An empty negative prompt is one's own too; null is none.
    assert (two.negative, three.negative) == ("", "config's")


def test_geneval_records_are_read_as_published_with_the_tag_as_task(tmp_path: Path) -> None:
    rows = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [], "prompt": "two cups"},
        {"tag": "counting", "include": [], "task": "own", "prompt": "a cup"},
        {"tag": "holiday", "prompt": "a beach"},
    ]
    path = write(tmp_path, "evaluation_metadata.jsonl", "\n".join(map(json.dumps, rows)))
    first, second, third = open_prompts(path, column="prompt")
    assert first.text == "two cups"
    assert first.metadata == {"tag": "counting", "include": rows[0]["include"], "exclude": [], "task": "counting"}
    assert second.metadata["task"] == "own"
    assert third.metadata == {"tag": "holiday"}


def test_csv_cells(tmp_path: Path) -> None:
    text = 'text,negative,metadata,source\r\n"a, ""b""\r\nc",own,"{""k"": 1}",x\r\n\r\nplain,,,\r\n'
    first, second = open_prompts(write(tmp_path, "p.csv", "\ufeff" + text), negative="config's")
    assert first == Prompt(0, 'a, "b"\r\nc', "own", None, {"source": "x", "k": 1})
    assert second == Prompt(1, "plain", "config's")


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(words, min_size=1, max_size=8), st.data())
def test_every_csv_jsonl_and_json_record_is_found_by_its_index(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    # The csv module's own writer and json.dumps say what the files mean.
    folder, cells = tmp_path_factory.getbasetemp(), io.StringIO(newline="")
    writer = csv.writer(cells, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "text"), *enumerate(texts)])
    lines = "\n".join(json.dumps({"id": str(i), "text": text}, ensure_ascii=False) for i, text in enumerate(texts))
    listed = json.dumps([{"id": str(i), "text": text} for i, text in enumerate(texts)], ensure_ascii=False, indent=1)
    for path in (
        write(folder, "h.csv", cells.getvalue()),
        write(folder, "h.jsonl", lines),
        write(folder, "h.json", listed),
    ):
        source = open_prompts(path)
        assert len(source) == len(texts)
        index = data.draw(st.integers(0, len(texts) - 1))
        assert source[index] == Prompt(index, texts[index], metadata={"id": str(index)})


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_every_text_line_is_found_by_its_index(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    content = "\n".join(texts)
    expected = [line.strip() for line in content.removeprefix("\ufeff").split("\n") if line.strip()]
    path = write(tmp_path_factory.getbasetemp(), "h.txt", content)
    if expected:
        assert [prompt.text for prompt in open_prompts(path)] == expected
    else:
        assert "holds no prompts" in refusal(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "json"])
def test_large_file_costs_no_memory(tmp_path: Path, suffix: str) -> None:
    lines = 20_000
    entry = '{{"text": "{0} {1}"}}\n'
    make = {"txt": "{0} {1}\n", "jsonl": entry, "csv": '"{0} {1}"\n', "json": f",{entry}"}[suffix]
    path = tmp_path / f"large.{suffix}"
    with path.open("w") as file:
        file.write({"csv": "text\n", "json": '["first"'}.get(suffix, ""))
        file.writelines(make.format(i, "x" * 200) for i in range(lines))
        file.write("]" if suffix == "json" else "")
    tracemalloc.start()
    source = open_prompts(str(path))
    assert source[len(source) - 1].text.split()[0] == str(lines - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 200 * lines
    # 8 bytes per prompt, twice that while the index grows, and a constant for buffers.
    assert peak < 16 * lines + 300_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "text\n", "holds no prompts"),
        ("p.txt", b"good\nb\xffd\n", "line 2 is not UTF-8"),
        ("p.txt", "utf-16".encode("utf-16"), "line 1 is not UTF-8"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("p.jsonl", '{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("p.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', "line 2 has no field 'text' (it has prompt)"),
        ("p.jsonl", '{"text": ""}\n', "line 1 has an empty 'text'"),
        ("p.jsonl", '{"text": null}\n', "line 1 has an empty 'text'"),
        ("p.jsonl", '{"text": 3}\n', "line 1: text=3 is not text"),
        ("p.jsonl", '{"text": "a", "negative": 3}\n', "line 1: negative=3 is not text"),
        ("p.jsonl", '{"text": "a", "metadata": [1]}\n', "line 1: metadata [1] must be a mapping"),
        ("p.jsonl", '{"text": "a", "image": "no.png"}\n', "line 1: image 'no.png' is not a file"),
        ("p.csv", "prompt,other\na,b\n", "line 1 has no field 'text' (it has prompt, other)"),
        ("p.csv", 'text,o\n"a\nb",c\n ,d\n', "line 4 has an empty 'text'"),
        ("p.csv", "text\na\n\nb, c\n", "line 4 has 2 cells for 1 columns"),
        ("p.csv", 'text\na\n"open\nto the end\n', "line 3 is not CSV"),
        ("p.csv", 'text,metadata\na,"{"\n', "line 2: metadata '{' is not JSON"),
        ("p.json", "", "is no JSON list"),
        ("p.json", '{"text": "a"}', "is no JSON list"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '["a", ""]', "entry 2 has an empty 'text'"),
        ("p.json", '["a", 3]', "entry 2 is neither a text nor an object"),
        ("p.json", '["a", {"prompt": "b"}]', "entry 2 has no field 'text' (it has prompt)"),
        ("p.json", '["a", "b]', "entry 2 is not JSON: Unterminated string"),
        ("p.json", '["a" "b"]', "has '\"' after entry 1"),
        ("p.json", '["a"', "has the end of the file after entry 1"),
        ("p.json", '["a",]', "entry 2 is not JSON"),
        ("p.json", '["a"] ["b"]', "goes on after its list"),
        ("p.json", b'["\xff"]', "entry 1 is not JSON in UTF-8"),
        ("p.doc", "a", "no known form"),
    ],
)
def test_unusable_file_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    message = refusal(write(tmp_path, name, content))
    assert expected in message
    assert str(tmp_path / name) in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "none.txt"))
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in refusal(str(tmp_path / "folder.csv"))


def test_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "one\ntwo\n")
    source = open_prompts(path)
    write(tmp_path, "p.txt", "another\nlist\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(PromptError, match="has changed"):
        source[1]


def test_shapes_prompts_are_numbered_from_zero_and_disjoint() -> None:
    train, heldout = open_prompts("shapes:train", negative="n"), open_prompts("shapes:heldout")
    assert [heldout[i].id for i in (0, len(heldout) - 1)] == [0, len(heldout) - 1]
    assert train[0].negative == "n"
    assert heldout[0].negative == ""
    assert not {p.text for p in train} & {p.text for p in heldout}


def test_unknown_shapes_split() -> None:
    assert "use shapes:train or shapes:heldout" in refusal("shapes:test")


@pytest.mark.parametrize("kind", ["shapes", "shapes-video", "shapes-i2v", "shapes-t2i"])
def test_shapes_without_a_split(kind: str) -> None:
    assert f"prompts '{kind}' name no split: use {kind}:train or {kind}:heldout" in refusal(kind)


def test_an_unknown_form_is_told_the_known_ones() -> None:
    message = refusal("prompts.doc")
    for form in (".txt", ".parquet", "hf:", "images:", "hpd:", "pickapic:", "vidprom:", "consisid:", "shapes-i2v:"):
        assert form in message


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=700)
    return str(path)


def test_parquet_rows_are_found_by_their_index(tmp_path: Path) -> None:
    n = 2500  # several row groups and several batches
    columns = {
        "text": [f"prompt {i}" for i in range(n)],
        "negative": [None if i % 2 else "own" for i in range(n)],
        "metadata": [{"half": i / 2} for i in range(n)],
        "picture": [{"bytes": b"png", "path": None}] * n,
        "raw": [b"png"] * n,
    }
    source = open_prompts(parquet(tmp_path / "p.parquet", columns), negative="config's")
    assert len(source) == n
    for i in (0, 699, 700, 1023, 1024, 2047, n - 1):
        negative = "config's" if i % 2 else "own"
        assert source[i] == Prompt(i, f"prompt {i}", negative, metadata={"half": i / 2})


def test_parquet_with_categories(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    texts = [f"prompt {i % 900}" for i in range(2000)]
    source = open_prompts(parquet(tmp_path / "p.parquet", {"text": pa.array(texts).dictionary_encode()}))
    assert [prompt.text for prompt in source] == texts


def test_unusable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    assert "row 2 has an empty 'text'" in refusal(parquet(path, {"text": ["a", None]}))
    assert "p.parquet has no field 'text' (it has prompt)" in refusal(parquet(path, {"prompt": ["a"]}))
    assert "p.parquet has no field 'text' (it has raw)" in refusal(parquet(path, {"raw": [b"a"]}))
    assert "row 1: text=1 is not text" in refusal(parquet(path, {"text": [1]}))
    assert "holds no prompts" in refusal(parquet(path, {"text": []}))
    assert "cannot read prompts" in refusal(write(tmp_path, "p.parquet", b"not parquet"))


def test_hub_dataset_from_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write(
        tmp_path,
        "data/train.jsonl",
        '{"prompt": "a", "negative": null, "k": 1}\n{"prompt": "b", "negative": "own", "k": 2}\n',
    )
    write(tmp_path, "data/test.jsonl", '{"prompt": "c", "negative": "own", "k": 3}\n')
    name = tmp_path / "data"
    train = [Prompt(0, "a", "n", metadata={"k": 1}), Prompt(1, "b", "own", metadata={"k": 2})]
    assert list(open_prompts(f"hf:{name}", column="prompt", negative="n")) == train
    assert capsys.readouterr().err == ""  # the progress bars of `datasets` stay away
    assert [p.text for p in open_prompts(f"hf:{name}:test", column="prompt")] == ["c"]
    assert [p.text for p in open_prompts(f"hf:{name}:train[1:]", column="prompt")] == ["b"]
    assert f"hf:{name}:train has no field 'text' (it has prompt, negative, k)" in refusal(f"hf:{name}")
    assert "cannot load hf:" in refusal(f"hf:{name}:absent", column="prompt")


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "p.parquet"), ("datasets", "hf:org/name")])
def test_missing_extra_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "p.parquet", b"")
    assert f"needs {package}: pip install 'dancegrpo[hf]'" in refusal(source)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 30))
def test_each_epoch_visits_each_prompt_exactly_once(length: int, per_iteration: int, seed: int, epoch: int) -> None:
    sampler = GroupSampler(length, per_iteration, seed)
    first, last = epoch * length, (epoch + 1) * length
    iterations = range(first // per_iteration, (last - 1) // per_iteration + 1)
    drawn = [index for iteration in iterations for index in sampler.indices(iteration)]
    begin = first - iterations.start * per_iteration
    assert sorted(drawn[begin : begin + length]) == list(range(length))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99), st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_iterations_may_be_asked_for_in_any_order(length: int, per_iteration: int, seed: int, order: list[int]) -> None:
    sampler = GroupSampler(length, per_iteration, seed)
    for iteration in order:
        assert sampler.indices(iteration) == GroupSampler(length, per_iteration, seed).indices(iteration)


def test_order_depends_on_seed_and_epoch() -> None:
    first, second = GroupSampler(50, 50, 0), GroupSampler(50, 50, 1)
    assert first.indices(0) != second.indices(0) != second.indices(1) != list(range(50))


def test_order_is_the_same_on_every_machine() -> None:
    # numpy guarantees PCG64's raw stream: 16.91, 16.80, 16.17, 5.71, 17.61, 3.23 (e18), whose order this is.
    assert GroupSampler(6, 6, 42).indices(0) == [5, 3, 2, 1, 0, 4]


def test_places_are_uniform() -> None:
    n, epochs = 8, 4000
    sampler = GroupSampler(n, n, 3)
    first = [sampler.indices(epoch)[0] for epoch in range(epochs)]
    # Each count is binomial: 500 +- 21; five standard deviations.
    assert all(abs(first.count(i) - epochs / n) < 105 for i in range(n))


def test_a_million_prompts_keep_four_bytes_each() -> None:
    sampler = GroupSampler(1_000_000, 16, 0)
    tracemalloc.start()
    assert len(set(sampler.indices(0))) == 16
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4_100_000


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_sampler_needs_prompts(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GroupSampler(*arguments, seed=0)
