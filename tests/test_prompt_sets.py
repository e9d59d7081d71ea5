"""Public prompt sets in their published layouts, which records are left out, and reference images of every origin."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dancegrpo import prompt_images
from dancegrpo.config import load_config
from dancegrpo.errors import ConfigError, PromptError
from dancegrpo.prompts import Prompt, open_prompts

VIDPROM = ("uuid", "prompt", "time", "toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(PromptError) as caught:
        list(open_prompts(source, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def dump(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def texts(source: str, **options: Any) -> list[str]:
    return [prompt.text for prompt in open_prompts(source, **options)]


def picture(shade: int = 0, mode: str = "RGB", size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new(mode, size, (shade,) * len(mode))


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


# Layouts: HPSv2's README (train.json, test.json, benchmark), the cards of pickapic_v2_no_images and VidProM, and the
# loader of ConsisID.
def test_hpd_annotations(tmp_path: Path) -> None:
    train = [
        {"human_preference": [1, 0], "prompt": "a fox", "file_path": ["0.jpg", "1.jpg"], "user_hash": "u"},
        {"human_preference": [0, 1], "prompt": "a fox", "file_path": ["2.jpg", "3.jpg"], "user_hash": "v"},
        {"human_preference": [0, 1], "prompt": "an owl", "file_path": ["4.jpg", "5.jpg"], "user_hash": "v"},
    ]
    source = open_prompts(f"hpd:{dump(tmp_path / 'train.json', train)}")
    assert [(prompt.id, prompt.text) for prompt in source] == [(0, "a fox"), (1, "an owl")]
    assert source[1].metadata["file_path"] == ["4.jpg", "5.jpg"]


def test_hpd_benchmark_folder_is_one_list_with_styles_as_tasks(tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        dump(tmp_path / f"{style}.json", [f"{style} one", f"{style} two"])
    dump(tmp_path / "drawbench.json", ["not in the benchmark"])
    source = open_prompts(f"hpd:{tmp_path}", negative="n")
    assert len(source) == 8
    assert source[2] == Prompt(2, "concept-art one", "n", metadata={"task": "concept-art"})
    assert [prompt.id for prompt in source] == list(range(8))
    assert texts(f"hpd:{tmp_path / 'photo.json'}") == ["photo one", "photo two"]
    (tmp_path / "photo.json").unlink()
    assert "photo.json does not exist" in refusal(f"hpd:{tmp_path}")


def test_a_prompt_of_several_styles_is_kept_with_the_first(tmp_path: Path) -> None:
    lists = {"anime": ["a", "b"], "concept-art": ["b", "c"], "paintings": [" a"], "photo": ["d", "c", "d"]}
    for style, listed in lists.items():
        dump(tmp_path / f"{style}.json", listed)
    kept = [(prompt.id, prompt.text, prompt.metadata["task"]) for prompt in open_prompts(f"hpd:{tmp_path}")]
    assert kept == [(0, "a", "anime"), (1, "b", "anime"), (2, "c", "concept-art"), (3, "d", "photo")]


def test_pick_a_pic_rows_repeat_their_captions(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    captions = [f"caption {i // 7}" for i in range(700)]
    table = {"caption": [*captions, ""], "jpg_0": [b"x"] * 701, "ranking_id": range(701), "label_0": [0.5] * 701}
    pq.write_table(pa.table(table), tmp_path / "train.parquet", row_group_size=300)
    source = open_prompts(f"pickapic:{tmp_path / 'train.parquet'}")
    assert [prompt.text for prompt in source] == [f"caption {i}" for i in range(100)]
    assert source[99].metadata == {"ranking_id": 693, "label_0": 0.5}


def test_pick_a_pic_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"caption": text, "ranking_id": i} for i, text in enumerate(["a", "b", "a", "", "c"])]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_prompts(f"pickapic:hf:{tmp_path / 'data'}:test")
    assert list(source) == [Prompt(i, t, metadata={"ranking_id": r}) for i, (t, r) in enumerate(zip("abc", (0, 1, 4)))]


def vidprom(path: Path, rows: list[tuple[Any, ...]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([VIDPROM, *rows])
    return str(path)


def test_vidprom_without_what_its_probabilities_call_unsafe(tmp_path: Path) -> None:
    safe = (0.01, 0.02, 0.0, 0.0, 0.0, 0.0)
    rows = [
        ("u1", 'a dragon, "flying"\nover a lake -ar 16:9', "2023-06-20", *safe),
        ("u2", "rude", "2023-06-20", 0.9, *safe[1:]),
        ("u3", "on the bound", "2023-06-20", 0.2, *safe[1:]),
        ("u4", "unknown", "2023-06-20", "nan", *safe[1:]),
    ]
    file = vidprom(tmp_path / "VidProM_unique.csv", rows)
    assert len(open_prompts(f"vidprom:{file}")) == 4
    first, second = open_prompts(f"vidprom:{file}", at_most={"toxicity": 0.2, "threat": 0.5})
    assert (first.text, first.metadata["uuid"]) == (rows[0][1], "u1")
    assert (second.id, second.text) == (1, "on the bound")


def test_consisid_captions_and_first_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for shade in (200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    captions = [{"path": "/data/part/clip.mp4", "cap": "a man nods", "fps": 24.0, "duration": 4.0}]
    file = dump(tmp_path / "video_caption_train.json", captions)
    (plain,) = open_prompts(f"consisid:{file}")
    assert (plain.text, plain.image, plain.metadata["path"]) == ("a man nods", None, "/data/part/clip.mp4")
    (framed,) = open_prompts(f"consisid:{file}", image="path", images=str(tmp_path / "videos"))
    assert framed.image.size == (32, 32)
    assert abs(np.asarray(framed.image).mean() - 200) < 8  # the first frame's, after a lossy codec
    clip = tmp_path / "videos" / "clip.mp4"
    clip.write_bytes(clip.read_bytes()[:40])
    with pytest.raises(PromptError, match=r"entry 1: image .*clip.mp4 cannot be read"):
        open_prompts(f"consisid:{file}", image="path", images=str(tmp_path / "videos"))
    clip.write_bytes(b"no clip")
    assert "clip.mp4 cannot be read" in refusal(f"consisid:{file}", image="path", images=str(tmp_path / "videos"))


def test_a_column_of_ones_own_wins_over_the_published_one(tmp_path: Path) -> None:
    file = dump(tmp_path / "refined.json", [{"prompt": "old", "refined": "new"}])
    assert texts(f"hpd:{file}", column="refined") == ["new"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["a", "b", " a", "c", "", " ", "d"]), min_size=1, max_size=12))
def test_unique_keeps_the_first_of_each_text_in_order(
    tmp_path_factory: pytest.TempPathFactory, found: list[str]
) -> None:
    expected = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    folder = tmp_path_factory.getbasetemp()
    jsonl = folder / "u.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": text}) for text in found))
    for file in (dump(folder / "u.json", found), jsonl):
        if expected:
            assert [text.strip() for text in texts(str(file), unique=True)] == expected
        else:
            assert "holds no prompts" in refusal(str(file), unique=True)


def test_equal_texts_with_other_images_or_negatives_are_no_repeats(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
    rows = [{"text": "t", "image": name, "negative": n} for name in ("a.png", "b.png") for n in ("", "n", "n")]
    assert len(open_prompts(str(dump(tmp_path / "p.json", rows)), unique=True)) == 4


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_at_most_keeps_exactly_what_every_bound_allows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, float]], a: float, b: float
) -> None:
    file = tmp_path_factory.getbasetemp() / "bounds.csv"
    file.write_text("text,a,b\n" + "".join(f"{i},{x!r},{y!r}\n" for i, (x, y) in enumerate(rows)))
    expected = [str(i) for i, (x, y) in enumerate(rows) if x <= a and y <= b]
    if expected:
        assert texts(str(file), at_most={"a": a, "b": b}) == expected
    else:
        assert "none within prompts.at_most" in refusal(str(file), at_most={"a": a, "b": b})


def test_bounds_on_what_is_no_number_are_refused_and_texts_are_taken_whole(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("text,a\none,0.5\ntwo,high\n")
    assert "line 3: a='high' is not a number" in refusal(str(file), at_most={"a": 1})
    assert "line 2 has no field 'b' (it has text, a): mend prompts.at_most" in refusal(str(file), at_most={"b": 1})
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert texts(str(tmp_path / "p.txt"), at_most={"a": 0}) == ["one", "two"]
    assert texts(str(dump(tmp_path / "p.json", ["one", {"text": "two", "a": 1}, "three"])), at_most={"a": 0}) == [
        "one",
        "three",
    ]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("p.csv", "prompt,toxicity\nok,0.1\nbad thing,\n", "line 3 has no field 'toxicity'"),
        ("p.csv", "prompt,toxicty\nbad thing,0.9\n", "line 2 has no field 'toxicity' (it has prompt, toxicty)"),
        ("p.csv", "prompt\nbad thing\n", "line 2 has no field 'toxicity' (it has prompt)"),
        ("p.jsonl", '{"prompt": "bad thing"}\n', "line 1 has no field 'toxicity'"),
        ("p.jsonl", '{"prompt": "bad thing", "toxicity": null}\n', "line 1: toxicity=None is not a number"),
        ("p.json", '["a text", {"prompt": "bad thing"}]', "entry 2 has no field 'toxicity'"),
    ],
)
def test_an_unrated_record_is_refused_where_ratings_decide(tmp_path: Path, name: str, content: str, place: str) -> None:
    (tmp_path / name).write_text(content)
    assert place in refusal(f"vidprom:{tmp_path / name}", at_most={"toxicity": 0.2})


def test_an_unrated_row_of_a_table_is_refused_where_ratings_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.parquet"
    pq.write_table(pa.table({"prompt": ["ok", "bad thing"], "toxicity": [0.1, None]}), file)
    assert "row 2 has no field 'toxicity'" in refusal(f"vidprom:{file}", at_most={"toxicity": 0.2})
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = f"vidprom:hf:{tmp_path / 'data'}"
    assert "row 2 has no field 'toxicity'" in refusal(hub, at_most={"toxicity": 0.2})


OPEN = """
import resource, sys
from dancegrpo.prompts import open_prompts
open_prompts("hpd:" + sys.argv[1])  # what the first use of the readers costs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_prompts("vidprom:" + sys.argv[2], at_most={"toxicity": 0.85})
print(len(source), source[len(source) - 1].text.strip(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_vidprom_sized_files_cost_no_memory(tmp_path: Path) -> None:
    count, file = 200_000, tmp_path / "VidProM_unique.csv"
    with file.open("w") as out:
        out.write(",".join(VIDPROM) + "\n")
        out.writelines(f"uuid-{i},{i % 150_000}{'x' * 300},2023,{i % 10 / 10},0,0,0,0,0\n" for i in range(count))
    small = str(dump(tmp_path / "small.json", ["a"]))
    told = subprocess.run([sys.executable, "-c", OPEN, small, str(file)], capture_output=True, text=True, check=True)
    length, last, kilobytes = told.stdout.split()
    assert (int(length), last.rstrip("x")) == (135_000, "149998")
    # 16 bytes per record and what sorting them takes; the file is four times the bound.
    assert file.stat().st_size > 60_000_000
    assert int(kilobytes) < 15_000


def embedded(images: list[Any]) -> dict[str, Any]:
    return {"text": [f"prompt {i}" for i in range(len(images))], "image": images}


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    shades = list(range(0, 200, 10))
    for kind, wrap in (("struct", lambda data: {"bytes": data, "path": "x.png"}), ("plain", lambda data: data)):
        file = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table(embedded([wrap(png(picture(s))) for s in shades])), file, row_group_size=6)
        source = open_prompts(str(file), unique=kind == "plain")
        assert [np.asarray(source[i].image).max() for i in (0, 5, 6, 13, 19)] == [0, 50, 60, 130, 190]
        assert source[3].metadata == {}
    pq.write_table(pa.table(embedded([wrap(png(picture())), b"no picture"])), file)
    assert "row 2: image in its bytes cannot be read" in refusal(str(file))


def test_hub_dataset_with_an_image_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {"text": datasets.Value("string"), "image": datasets.Image(), "k": datasets.Value("int64")}
    )
    rows = {"text": ["a", "b", "a"], "image": [picture(10), picture(250), picture(10)], "k": [1, 2, 3]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    source = open_prompts(f"hf:{tmp_path / 'data'}")
    assert [(p.text, np.asarray(p.image).max(), dict(p.metadata)) for p in source] == [
        ("a", 10, {"k": 1}),
        ("b", 250, {"k": 2}),
        ("a", 10, {"k": 3}),
    ]
    assert len(open_prompts(f"hf:{tmp_path / 'data'}", unique=True)) == 2


def test_image_field_and_folder_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    picture().save(tmp_path / "frames" / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    (prompt,) = open_prompts(str(tmp_path / "metadata.jsonl"), image="file_name", images=str(tmp_path / "frames"))
    assert prompt == Prompt(0, "a", image=tmp_path / "frames" / "0.png")
    assert "image '0.png' is not a file" in refusal(str(tmp_path / "metadata.jsonl"), image="file_name")
    options = {"image": "file_name", "images": str(tmp_path / "none")}
    assert "none is not a folder" in refusal(str(tmp_path / "metadata.jsonl"), **options)


def test_folder_of_captioned_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.webp"):
        picture().save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a fox\nruns\n")
    (tmp_path / "prompt.txt").write_text("\ufeffit moves")
    (tmp_path / "notes.md").write_text("no picture")
    assert list(open_prompts(f"images:{tmp_path}", negative="n")) == [
        Prompt(0, "a fox runs", "n", tmp_path / "a.jpg"),
        Prompt(1, "it moves", "n", tmp_path / "b.png"),
        Prompt(2, "it moves", "n", tmp_path / "c.webp"),
    ]


def test_settings_of_records_in_a_folder_of_pictures(tmp_path: Path) -> None:
    for name, text in (("a", "runs"), ("b", " "), ("c", "runs")):
        picture().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    source = f"images:{tmp_path}"
    # Other pictures are other requests, so that only the empty text is left out.
    assert [p.image.name for p in open_prompts(source, unique=True, column="caption")] == ["a.png", "c.png"]
    assert [p.id for p in open_prompts(source, unique=True)] == [0, 1]
    assert "has no fields to compare: take prompts.at_most out" in refusal(source, at_most={"toxicity": 0.2})
    for name in "ac":
        (tmp_path / f"{name}.txt").write_text("")
    assert "holds no prompts: write at least one" in refusal(source, unique=True)


@pytest.mark.parametrize("source", ["hf:", "hf::train", "images:", "hpd:", "vidprom:", "hpd:hf:", "hpd:images:"])
def test_a_prefix_with_nothing_behind_is_refused(source: str) -> None:
    kind = source.removeprefix("hpd:").partition(":")[0] or "hpd"
    assert f"{kind}: names nothing: write {kind}:" in refusal(source)


def imageless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, images: list[bool]) -> tuple[str, str]:
    """A source of prompts with (True) and without an image, and what comes before the number of a place in it."""
    picture().save(tmp_path / "a.png")
    rows = [{"text": f"prompt {i}", **({"image": "a.png"} if has else {})} for i, has in enumerate(images)]
    if form == "jsonl":
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "p.jsonl"), f"{tmp_path / 'p.jsonl'} line"
    if form == "csv":
        (tmp_path / "p.csv").write_text("text,image\n" + "".join(f"{r['text']},{r.get('image', '')}\n" for r in rows))
        return str(tmp_path / "p.csv"), f"{tmp_path / 'p.csv'} line"
    if form == "json":
        dump(tmp_path / "p.json", rows)
        return str(tmp_path / "p.json"), f"{tmp_path / 'p.json'} entry"
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    data = png(picture())
    cell = {
        "paths": lambda has: "a.png" if has else None,
        "bytes": lambda has: data if has else None,
        "struct": lambda has: {"bytes": data, "path": None} if has else None,
        "hollow": lambda has: {"bytes": data if has else None, "path": None},
        "hub": lambda has: {"bytes": data, "path": None} if has else None,
    }[form]
    (tmp_path / "data").mkdir(exist_ok=True)
    file = tmp_path / ("data/train.parquet" if form == "hub" else "p.parquet")
    table = {"text": [row["text"] for row in rows], "image": [cell(has) for has in images]}
    pq.write_table(pa.table(table), file, row_group_size=2)
    if form != "hub":
        return str(file), f"{file} row"
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return f"hf:{tmp_path / 'data'}", f"hf:{tmp_path / 'data'}:train row"


@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "paths", "bytes", "struct", "hollow", "hub"])
@pytest.mark.parametrize("images", [[True] * 4, [True, True, True, False, True, False]])
def test_the_first_prompt_without_an_image_is_known_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, images: list[bool]
) -> None:
    source, place = imageless(tmp_path, monkeypatch, form, images)
    first = 4 + (form == "csv")  # the header is a line, too
    expected = None if all(images) else f"{place} {first}"
    assert open_prompts(source).first_without_image == expected
    # Where all the records without one are left out, none is without.
    assert open_prompts(source, unique=True).first_without_image == expected


def test_only_records_that_are_left_in_need_an_image(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    rows = [{"text": "a", "k": 2}, {"text": "b", "image": "a.png", "k": 0}, {"text": "c", "k": 1}]
    file = str(dump(tmp_path / "p.json", rows))
    assert open_prompts(file, at_most={"k": 0}).first_without_image is None
    assert open_prompts(file, at_most={"k": 1}).first_without_image == f"{file} entry 3"


def test_places_without_an_image_in_sources_of_other_kinds(tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        dump(tmp_path / f"{style}.json", [style])
    assert open_prompts(f"hpd:{tmp_path}").first_without_image == f"{tmp_path / 'anime.json'} entry 1"
    (tmp_path / "p.txt").write_text("\na\n")
    assert open_prompts(str(tmp_path / "p.txt")).first_without_image == f"{tmp_path / 'p.txt'} line 2"
    assert open_prompts("shapes:train").first_without_image == "prompt 0"
    assert open_prompts("shapes-i2v:heldout").first_without_image is None
    picture().save(tmp_path / "a.png")
    (tmp_path / "prompt.txt").write_text("it moves")
    assert open_prompts(f"images:{tmp_path}").first_without_image is None


def test_a_table_of_pandas_has_an_index_without_a_name(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text(",text,image\n0,a,no.png\n1,b,\n")
    assert [(p.text, p.metadata) for p in open_prompts(str(file), image=None)] == [
        ("a", {"image": "no.png"}),
        ("b", {}),
    ]


def test_unusable_folders_of_pictures(tmp_path: Path) -> None:
    source = f"images:{tmp_path}"
    assert "none is not a folder" in refusal(f"{source}/none")
    assert "holds no pictures" in refusal(source)
    picture().save(tmp_path / "a.png")
    assert "a.png has no text: write a.txt, or prompt.txt for all" in refusal(source)
    (tmp_path / "a.txt").write_text(" \n")
    assert "a.txt is empty" in refusal(source)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert "a.txt is not UTF-8" in refusal(source)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert "a.png cannot be read" in refusal(source)


def test_a_clip_without_pictures_is_refused_at_opening(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "start.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file = dump(tmp_path / "p.json", [{"text": "a", "image": "start.mkv"}])
    with pytest.raises(PromptError, match=r"entry 1: image .*start.mkv cannot be read"):
        open_prompts(str(file))


@pytest.mark.parametrize("damaged", [b"", b"no picture", png(picture(size=(64, 64)))[:60]])
def test_a_damaged_image_is_refused_by_its_name_at_opening(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "start.png").write_bytes(damaged)
    file = dump(tmp_path / "p.json", [{"text": "a", "image": "start.png"}])
    with pytest.raises(PromptError, match=r"p.json entry 1: image .*start.png cannot be read"):
        open_prompts(str(file))


def test_of_a_large_source_only_the_first_images_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dancegrpo.prompts.CHECKED", 2)
    checked: list[str] = []
    check = prompt_images.check_image
    monkeypatch.setattr(
        "dancegrpo.prompts.check_image", lambda image, where: (checked.append(Path(image).name), check(image, where))
    )
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        picture().save(tmp_path / name)
    file = dump(tmp_path / "p.json", [{"text": "a", "image": name} for name in names])
    source = open_prompts(str(file))
    assert checked == names[:2]
    (tmp_path / "3.png").unlink()
    with pytest.raises(PromptError, match=r"image '3\.png' is not a file"):
        source[3]
    assert "entry 4: image '3.png' is not a file" in refusal(str(file))  # whether it exists is seen of every one


@pytest.mark.parametrize("value", [3, ["a.png"], {"url": "a.png"}, "none.png", "x" * 5000])
def test_what_is_no_image_is_refused(tmp_path: Path, value: Any) -> None:
    message = refusal(str(dump(tmp_path / "p.json", [{"text": "a", "image": value}])))
    assert "is not a file: give a path" in message
    assert len(message) < 500


def paletted(colours: list[int]) -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette(colours)
    return image


def turned(orientation: int) -> Image.Image:
    data = io.BytesIO()
    exif = Image.Exif()
    exif[274] = orientation
    picture(9).save(data, "PNG", exif=exif)
    return Image.open(data)


@pytest.mark.parametrize(
    "images",
    [
        (picture(1), picture(2)),
        (picture(1), picture(1, size=(3, 4))),
        (Image.new("L", (2, 2), 7), Image.new("P", (2, 2), 7)),
        (paletted([0, 0, 0]), paletted([255, 0, 0])),
        (turned(1), turned(6)),
    ],
)
def test_pictures_that_look_unlike_are_other_requests(images: tuple[Image.Image, Image.Image]) -> None:
    one, other = (Prompt(0, "a", image=image).request() for image in images)
    assert one != other
    assert one == Prompt(5, "a", image=images[0].copy()).request()


def test_settings_reach_the_reader() -> None:
    config = load_config("shapes-flux", ["prompts.unique=true", "prompts.at_most.toxicity=0.2", "prompts.image=path"])
    assert config.prompts.reading() == {
        "column": "text",
        "negative": "",
        "image": "path",
        "images": None,
        "unique": True,
        "at_most": {"toxicity": 0.2},
    }
    with pytest.raises(ConfigError, match="at_most"):
        load_config("shapes-flux", ["prompts.at_most.toxicity=low"])
