"""What a run may never do: run what it reads, tell a secret, take a word for markup or for a path, listen to all."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import os
import re
import shutil
import struct
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

import dancegrpo
from dancegrpo import load_config, train
from dancegrpo.cli import app
from dancegrpo.config import load_reward_config
from dancegrpo.errors import ConfigError, DanceError, DeadJudgeError, ModelError, RewardError
from dancegrpo.policies import ModelCard, load_policy
from dancegrpo.policies.export import Usage, card_text
from dancegrpo.prompts import Prompt
from dancegrpo.redaction import redact
from dancegrpo.report import write_report
from dancegrpo.report.compare import compare_runs
from dancegrpo.rewards import FunctionReward, Judges, Scores
from dancegrpo.rewards.human import server as human_server
from dancegrpo.rewards.service import read_token, serve, wire
from dancegrpo.rewards.service.png import unpack_json
from dancegrpo.rewards.service.queueing import Line
from dancegrpo.rewards.service.server import describe_judge
from dancegrpo.rewards.vision_reward import load_reader
from dancegrpo.rewards.weights import read_tensors
from dancegrpo.settings import RewardConfig, RolloutConfig
from dancegrpo.studies import markdown_table
from dancegrpo.studies.pages import render, write_index
from fake_run import FakeRun
from test_study_pages import made, study

SOURCE = Path(dancegrpo.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file.relative_to(SOURCE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


@cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call in the package."""
    nodes = ((file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [(file, ast.unparse(node.func), node) for file, node in nodes]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


# --------------------------------------------------------------------------------------------- nothing read is run


def test_nothing_is_imported_that_runs_what_it_reads() -> None:
    forbidden = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "commands",
        "pty",
    }
    found = {
        f"{file}: {name}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
        if name.split(".")[0] in forbidden
    }
    assert len(FILES) > 100
    assert found == set()


def test_no_text_is_run_as_code_and_no_shell_is_asked() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile"}
    forbidden |= {"subprocess.getoutput", "subprocess.getstatusoutput", "code.interact", "runpy.run_path"}
    assert {f"{file}: {name}" for file, name, _ in calls() if name in forbidden or name.startswith("os.exec")} == set()
    assert {f"{file}: {name}" for file, name, call in calls() if keyword(call, "shell") is not None} == set()
    started = [call.args[0] for _, name, call in calls() if name in ("subprocess.run", "subprocess.Popen")]
    assert started
    assert all(isinstance(command, ast.List) for command in started)  # words, which no shell takes apart


def test_files_are_read_as_data_alone() -> None:
    """Tensors by weights_only=True, no arrays that may hold objects, YAML by safe loaders or OmegaConf's."""
    loads = [(file, call) for file, name, call in calls() if name in ("torch.load", "torch.serialization.load")]
    assert [file for file, _ in loads] == ["rewards/weights.py"]
    assert all(ast.unparse(keyword(call, "weights_only") or ast.Constant(None)) == "True" for _, call in loads)
    unsafe = {
        "yaml.load",
        "yaml.load_all",
        "yaml.unsafe_load",
        "yaml.full_load",
        "np.load",
        "numpy.load",
        "np.fromfile",
    }
    assert {f"{file}: {name}" for file, name, _ in calls() if name in unsafe} == set()


def test_hub_code_runs_where_a_setting_says_so_and_nowhere_else() -> None:
    """`trust_remote_code` is False, or a parameter of that name whose default is False; True within one class alone."""
    inside = {
        id(node)
        for class_ in ast.walk(TREES["rewards/vision_reward.py"])
        if isinstance(class_, ast.ClassDef) and class_.name == "HubCodeReader"  # made where the setting is true
        for node in ast.walk(class_)
    }
    passed = [(call, keyword(call, "trust_remote_code")) for _, _, call in calls()]
    told = {ast.unparse(value) for call, value in passed if value is not None and id(call) not in inside}
    assert told <= {"False", "trust_remote_code"}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(a.arg == "trust_remote_code" for a in node.args.args):
                given = dict(zip([a.arg for a in reversed(node.args.args)], reversed(node.args.defaults)))
                default = given.get("trust_remote_code")
                assert default is None or ast.unparse(default) == "False"


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "judge.pt")
    with pytest.raises(RewardError, match=r"judge\.pt' cannot be read") as refused:
        read_tensors(tmp_path / "judge.pt")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "sprung").exists()


def model_at(folder: Path) -> object:
    return load_config("shapes-sd", [f"model={{path: {folder}, height: 16, width: 16}}"]).model


def test_a_model_that_would_run_code_is_refused_unrun(tiny_sd_path: Path, tmp_path: Path) -> None:
    """By pickled weights, and by a Python file beside them that its index names."""
    pickled, coded = tmp_path / "pickled", tmp_path / "coded"
    for folder in (pickled, coded):
        shutil.copytree(tiny_sd_path, folder)
    for file in (pickled / "unet").glob("*.safetensors"):
        file.unlink()
    torch.save({"conv_in.weight": Trap(tmp_path / "sprung")}, pickled / "unet" / "diffusion_pytorch_model.bin")
    (coded / "unet" / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Net: pass\n")
    index = json.loads((coded / "model_index.json").read_text())
    (coded / "model_index.json").write_text(json.dumps({**index, "unet": ["mine", "Net"]}))
    for folder in (pickled, coded):
        with pytest.raises(ModelError):
            load_policy(model_at(folder), RolloutConfig())
    assert not (tmp_path / "sprung").exists()


def test_a_judges_repository_runs_no_code_unasked(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Config: pass\n")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Net"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    with pytest.raises(RewardError, match="set trust_remote_code: true to run the code of its repository"):
        load_reader(str(tmp_path), False, 4, 16)
    assert not (tmp_path / "sprung").exists()


def test_a_recipe_looks_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    with pytest.raises(ConfigError, match="nothing is looked up in a recipe"):
        load_config("shapes-flux", ["description='${oc.env:HF_TOKEN}'"])
    (tmp_path / "object.yaml").write_text("description: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "object.yaml")


# ------------------------------------------------------------------------------------------------ secrets stay secret

SECRET = "s3cr3t-value-0123456789"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"api_key": SECRET}, "api_key"),
        ({"openai_api_key": SECRET}, "openai_api_key"),
        ({"request": {"headers": {"Authorization": SECRET}}}, "request.headers.Authorization"),
        ({"url": f"https://me:{SECRET}@example.invalid/v1"}, "url"),
        ({"urls": ["http://a", f"http://{SECRET}@b"]}, "urls.1"),
        ({"words": ["hf_" + "aB3" * 10]}, "words.0"),
        ({"token": SECRET}, "token"),
        ({"password": SECRET}, "password"),
    ],
)
def test_settings_hold_no_secrets(options: dict, key: str) -> None:
    """What cannot be in the settings cannot be in config.yaml, trackers, reports, or a comparison of settings."""
    with pytest.raises(ConfigError, match=f"options.{re.escape(key)} holds a secret") as refused:
        load_reward_config("mine:judge", [f"options={json.dumps(options)}"])
    assert SECRET not in str(refused.value)
    assert "hf_" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key_env": "OPENAI_API_KEY", "token_env": "T", "token_file": "/run/token"},
        {"max_tokens": 16, "pad_token": "<pad>", "answer_key": "a", "url": "http://127.0.0.1:8000/v1"},
        {"token": None, "reward_token": "<|VQ_reward|>", "top_logprobs": 20},
    ],
)
def test_names_of_variables_and_words_of_a_language_are_no_secrets(options: dict) -> None:
    assert load_reward_config("mine:judge", [f"options={json.dumps(options)}"]).options == options


def test_errors_of_other_programs_are_told_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    (tmp_path / "token").write_text("a-token-from-a-file\n")
    read_token(file=tmp_path / "token")
    request = httpx.Request("GET", "https://me:pa55word@example.invalid/v1?api_key=query-secret&n=1")
    with pytest.raises(httpx.HTTPStatusError) as raised:
        httpx.Response(401, request=request).raise_for_status()
    words = f"{raised.value} {SECRET} a-token-from-a-file Bearer abcdefghijk {{'Authorization': 'Basic xyz'}}"
    for told in (redact(words), str(DanceError(words)), str(ModelError(words))):
        for secret in ("pa55word", "query-secret", SECRET, "a-token-from-a-file", "abcdefghijk", "xyz"):
            assert secret not in told
        assert "example.invalid/v1" in told
        assert "&n=1" in told


def test_plain_messages_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    text = "judge 'hps' asks for a bearer token at http://127.0.0.1:8000/v1: name it in token_env, 50% of a@b.c"
    assert redact(text) == text


def careless(images: torch.Tensor, prompts: list[str]) -> list[float]:
    if any("fail" in prompt for prompt in prompts):
        raise ValueError(f"401: incorrect key {os.environ['MY_SERVICE_TOKEN']} for https://u:{SECRET}@example.invalid")
    return [float(image.mean()) for image in images]


class Telling:
    """A judge that gives its own causes."""

    name, differentiable, batch_size = "telling", False, None

    def __call__(self, media: torch.Tensor, prompts: list[Prompt]) -> Scores:
        return Scores.failed(len(media), f"refused {os.environ['MY_SERVICE_TOKEN']}")

    def to(self, device: object) -> Telling:
        return self


def test_a_judges_failures_are_told_without_secrets(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """In causes, in the log, in the error that stops a run, and in what a reward service answers."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    judges = Judges({"careless": FunctionReward(careless), "telling": Telling()})
    media, prompts = torch.rand(4, 1, 3, 2, 2), [Prompt(n, "fail") for n in range(4)]
    with caplog.at_level(logging.DEBUG):
        scores = judges.score(media, prompts)
        line = Line("it", judges.rewards["careless"], batch_size=None, wait=0.0)
        answered = line.submit(wire.Request("1", media, prompts)).result(10)
        line.close(5)
    with pytest.raises(DeadJudgeError) as dead:
        judges.require_valid(scores)
    told = [*(str(s.causes) for s in scores.values()), caplog.text, str(dead.value)]
    told += [wire.pack_answer("1", "careless", answered).decode()]
    assert all(SECRET not in text for text in told)
    assert all("401: incorrect key ***" in text or "refused ***" in text for text in told)
    config = RewardConfig(judge="vlm", options={"url": "http://10.0.0.1/v1", "model": "m", "api_key_env": "MY_KEY"})
    assert "10.0.0.1" not in json.dumps(describe_judge("it", config, Telling()))


@pytest.fixture(scope="module")
def run(tiny_flux_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder around a real run: hostile prompts, a judge that tells its key, keys in the environment."""
    root = tmp_path_factory.mktemp("run")
    words = [hostile.replace("\ud83d", "") for hostile in (*HOSTILE, "../../x")]  # no tokenizer reads half a pair
    lines = [f"{word} fail" if n % 4 == 1 else word for n, word in enumerate(words)]
    (root / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings = {
        "name": NAME,
        "description": HOSTILE[0],
        "iterations": 1,
        "threads": 1,
        "model": {"path": str(tiny_flux_path), "height": 32, "width": 32, "max_sequence_length": 16},
        "prompts": {"train": str(root / "train.jsonl"), "per_iteration": 5, "cache_mb": 0},
        "rollout": {"group_size": 2, "num_steps": 3, "noise_level": 0.7, "shift": 1.5, "batch_size": 2},
        "rewards": {"careless": {"judge": "test_security:careless", "options": {"batch_size": 2}}},
        "evaluation": {"samples": 3},
        "tracking": {"backend": "none"},
    }
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("MY_SERVICE_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
            patch.setenv(variable, SECRET)
        train(load_config(settings), out=root / "out" / "here")
    return root


def test_no_file_of_a_run_holds_a_key(run: Path) -> None:
    """config.yaml, run.json, metrics, checkpoints, the report: all of them."""
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "metrics.jsonl", "report.html"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    row = json.loads((run / "out" / "here" / "metrics.jsonl").read_text())
    assert (row["samples/total"], row["samples/masked"]) == (10, 2)  # the judge was asked, and told its key


# -------------------------------------------------------------------------------- words are neither markup nor paths

HOSTILE = [
    '"><img src=x onerror=alert(1)></script></title></style></textarea><script>alert(1)</script>',
    "' onmouseover='alert(1)' x='{{7*7}}{% raw %}<!-- --><svg/onload=alert(1)>",
    "two\nlines\r\n\u2028\u202e\u200f&lt;b&gt;&#60;i&#62; ../../x \ud83d",
    ']]><a href="javascript:alert(1)">a</a>` | **b** [c](javascript:alert(1)) \x1b[31m',
]
NAME = "'\"><img src=x onerror=alert(1)><b {{7*7}} ..\u202e"
"""Of a run: it holds all but the slashes and line breaks that no folder's name may have."""
TAME = "a red circle"


class Skeleton(HTMLParser):
    """A page's elements and the names of their attributes, in order; its text; where its links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def safe(hostile: str, tame: str) -> Skeleton:
    """The hostile page, which has the tame one's elements and attributes, and no script or handler of its own."""
    found, expected = Skeleton(hostile), Skeleton(tame)
    assert found.elements == expected.elements
    assert not any(name.startswith("on") for _, names in found.elements for name in names)
    assert all(link.startswith(("data:", "#")) or re.fullmatch(r"[\w%.+-]+\.html", link) for link in found.links)
    return found


FAKE = FakeRun(iterations=4, held_out=12, evaluations=(0, 4), pictures=(0, 4), prompts_drawn=2, picture_size=8)


def fake(folder: Path, name: str, text: str) -> Path:
    """A run whose every word is `text`: prompts, tasks, judges, columns, machine, status, description."""
    made = replace(FAKE, name=name, prompt=text).write(folder)
    config = made / "config.yaml"
    config.write_text(config.read_text().replace("description: ", f"description: {json.dumps(text)} # "))
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    flat = text.replace("/", "")
    rows = [{**row, f"reward/{flat}/mean": 0.5, f"reward/shapes/{flat}": 1.0} for row in rows]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((made / "run.json").read_text())
    told = {"machine": {text: text}, "derived": {text: text}, "torch": text, "started": text, "status": text}
    (made / "run.json").write_text(json.dumps({**info, **told}))
    prompts = json.loads((made / "samples" / "prompts.json").read_text())
    (made / "samples" / "prompts.json").write_text(json.dumps([{"text": text, "task": text} for _ in prompts]))
    for file in (made / "evaluations").iterdir():
        record = json.loads(file.read_text())
        record["tasks"] = [text if task == "counting" else task for task in record["tasks"]]
        record["columns"][f"{text}/pass"] = record["columns"]["shapes/pass"]
        file.write_text(json.dumps(record))
    return made


@pytest.mark.parametrize("text", HOSTILE)
def test_the_report_takes_no_word_for_markup(text: str, tmp_path: Path) -> None:
    hostile, tame = (
        write_report(fake(tmp_path / at, name, words)).read_text(encoding="utf-8")
        for at, name, words in (("a", NAME, text), ("b", "tame", TAME))
    )
    shown = safe(hostile, tame).text
    assert "onerror" in shown  # the name, as text
    assert "49" not in re.findall(r"\w+", shown.split("{{", 1)[1][:8])


@pytest.mark.parametrize("text", HOSTILE[:2])
def test_a_comparison_takes_no_word_for_markup(text: str, tmp_path: Path) -> None:
    pages = []
    for at, name, words in (("a", NAME, text), ("b", "tame", TAME)):
        runs = [fake(tmp_path / at / number, name, words) for number in "12"]
        pages.append(compare_runs(runs, tmp_path / at / "page.html").page.read_text(encoding="utf-8"))
    assert "onerror" in safe(*pages).text


def test_the_pages_of_a_study_take_no_word_for_markup(tmp_path: Path) -> None:
    pages, indices = [], []
    for at, words in (("a", "".join(HOSTILE).replace("\ud83d", "")), ("b", TAME)):
        arms = {"base": {"label": words, "base": True}, "a": {"label": f"A {words}"}, "b": {"label": "B"}}
        claims = [{"text": words, "column": "shapes", "higher": "a", "lower": "b"}]
        fields = {"title": words, "question": words, "paper": words, "columns": {"shapes": words}}
        chosen = study(arms=arms, claims=claims, **fields)
        made(tmp_path / at, chosen, lambda job, column: 0.5, seeds=1)
        pages.append(render(chosen, tmp_path / at))
        (tmp_path / at / "tiny.html").rename(tmp_path / at / f"{NAME if at == 'a' else 'tame'}.html")
        indices.append(write_index(tmp_path / at).read_text(encoding="utf-8"))
        if at == "a":
            table = markdown_table(chosen, tmp_path / at)
    safe(*pages)
    safe(*indices)
    assert "<" not in table.replace("<br>", "")
    assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1


def test_a_real_runs_report_has_the_words_as_text_and_nothing_lies_elsewhere(run: Path) -> None:
    page = Skeleton((run / "out" / "here" / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE[0] in page.text
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(name.startswith("on") for _, names in page.elements for name in names)
    assert {file.name for file in run.iterdir()} == {"train.jsonl", "out"}
    assert {file.name for file in (run / "out").iterdir()} == {"here"}
    drawn = {file.name for file in (run / "out" / "here" / "samples").rglob("*") if file.is_file()}
    assert drawn == {"0.png", "1.png", "2.png", "grid.png", "prompts.json"}


def test_a_model_card_takes_no_word_for_markup() -> None:
    usage = Usage("DDIMScheduler", ".from_config(pipe.scheduler.config)", {"num_inference_steps": 4})

    def card(words: str) -> str:
        told = ModelCard(base_model=words, recipe=words, iterations=1, judges=(f"{words} (hps)",))
        return card_text(told, "text-to-image", usage, lora=True)

    for text in (*HOSTILE, NAME):
        written, tame = card(text.replace("\ud83d", "")), card(TAME)
        prose, _, rest = written.partition("```python\n")
        code, fence, after = rest.partition("\n```\n")
        assert "<" not in re.sub("`[^`\n]*`", "", prose + after)
        assert len(written.splitlines()) == len(tame.splitlines())  # no line of its own, in the front matter either
        assert fence
        assert [type(node) for node in ast.walk(ast.parse(code))] == [
            type(node) for node in ast.walk(ast.parse(tame.partition("```python\n")[2].partition("\n```\n")[0]))
        ]


def test_templates_escape_and_scripts_write_no_markup() -> None:
    made_with = [keyword(call, "autoescape") for _, name, call in calls() if name == "Environment"]
    assert made_with
    assert all(value is not None and ast.unparse(value) == "True" for value in made_with)
    unescaped = [
        match
        for file in SOURCE.rglob("*.j2")
        for match in re.findall(r"\{\{([^}]*\|\s*safe[^}]*)\}\}", file.read_text(encoding="utf-8"))
    ]
    assert {match.strip() for match in unescaped} == {"style|safe", "script|safe", "data|safe"}  # our own, and escaped
    writes = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    for file in SOURCE.rglob("*.js"):
        assert not re.search(writes, file.read_text(encoding="utf-8")), file


# ------------------------------------------------------------------------------------------- who may ask, and for what


def test_services_listen_on_loopback_unless_told() -> None:
    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"
    assert human_server.HOST == "127.0.0.1"
    anywhere = {
        f"{file}: {node.value}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::")
    }
    assert anywhere == set()
    refused = CliRunner().invoke(app, ["serve-reward", "jpeg", "--host", "0.0.0.0", "--port", "0"])
    assert isinstance(refused.exception, RewardError)
    assert "is open to other machines: set a token" in str(refused.exception)


def body_of(request: dict, **tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save({"media": torch.zeros(1, 1, 3, 2, 2), **tensors}, {"request": json.dumps(request)})


@pytest.mark.parametrize("named", ["/etc/passwd", "../secret.png", "media", "image.0"])
def test_a_client_names_no_file_of_the_server(named: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "in").mkdir()
    with pytest.raises(wire.WireError, match="an image that did not come with it") as refused:
        wire.unpack_request(body_of({"prompts": [{"text": "a", "image": named}]}), tmp_path / "in", 4)
    assert refused.value.status == 422
    with pytest.raises(wire.WireError, match=r"travels in safetensors requests only|no list of media|is no base64 PNG"):
        unpack_json(json.dumps({"prompts": [{"text": "a", "image": named}], "media": [named]}).encode(), 4, 10**6)


def test_a_clients_image_is_kept_under_a_name_of_the_servers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    request = body_of(
        {"prompts": [{"text": "a", "image": "../../x"}]}, **{"../../x": torch.zeros(3, dtype=torch.uint8)}
    )
    found = wire.unpack_request(request, tmp_path / "in", 4)
    assert [prompt.image for prompt in found.prompts] == [tmp_path / "in" / "0"]
    assert {file.name for file in tmp_path.rglob("*")} == {"in", "0"}


def test_a_length_that_a_client_makes_up_is_refused(tmp_path: Path) -> None:
    for body in (struct.pack("<Q", 2**63) + b"{}", b"", b"\x80\x04." + b"x" * 20):
        with pytest.raises(wire.WireError, match="the body is no request in safetensors"):
            wire.unpack_request(body, tmp_path, 4)
