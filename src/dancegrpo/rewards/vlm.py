"""A vision-language model as judge, behind any OpenAI-compatible endpoint, by a rubric that the user writes."""

from __future__ import annotations

import base64
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dancegrpo.errors import RewardError
from dancegrpo.prompts import Prompt
from dancegrpo.rewards.base import Scores, as_media, describe
from dancegrpo.rewards.chat import Answer, Endpoint, ScoreError, at_least
from dancegrpo.rewards.encoding import to_bytes, to_png

_log = logging.getLogger(__name__)


class VLMReward:
    """What a vision-language model answers to a rubric about the picture or clip, on the rubric's scale.

    The score is the expectation over the scale's digits, sum of d * p(d), p being the model's probabilities where the
    answer has its digit, renormalised over the digits of the scale that the server lists. A server that gives no
    log-probabilities (found out once, by the preflight) is taken at its word: the number in the answer. An answer
    with no number, several, or one outside the scale leaves the sample without a score.

    url: the API's base, such as `http://127.0.0.1:8000/v1`. model: the name the server knows it by. rubric: the
    question, `{prompt}` standing for the prompt; or rubric_file: path of a UTF-8 text file with it. api_key_env: name
    of the environment variable that holds the API key. scale: [lowest, highest] digit, within 0..9. frames: how many
    evenly spaced frames of a clip are sent, as that many pictures. timeout: seconds per try. retries: further tries
    after a failure that may pass. concurrency: requests under way at once. max_tokens: of the answer. top_logprobs:
    alternatives asked for per token. seed: sent with each request, beside temperature 0. request: further fields of
    the request's body; null removes one. batch_size: samples handed over at a time. preflight: ask once about a grey
    picture before the run starts.
    Raises RewardError for options that cannot be, and where the preflight fails.
    """

    name = "vlm"
    differentiable = False
    remote = True

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str | None = None,
        rubric_file: str | None = None,
        api_key_env: str | None = None,
        scale: Sequence[int] = (1, 5),
        frames: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 8,
        max_tokens: int = 16,
        top_logprobs: int = 20,
        seed: int = 0,
        request: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        preflight: bool = True,
    ) -> None:
        self.rubric, self.scale = _rubric(rubric, rubric_file), _scale(scale)
        at_least(1, frames=frames, max_tokens=max_tokens, top_logprobs=top_logprobs, batch_size=batch_size)
        self.batch_size: int | None = batch_size
        self.frames, self.concurrency, self.top_logprobs = frames, concurrency, top_logprobs
        self.fields = {"model": model, "temperature": 0, "seed": seed, "max_tokens": max_tokens}
        self.overrides = dict(request or {})
        self.endpoint = Endpoint(url, api_key_env, timeout=timeout, retries=retries, connections=concurrency)
        self.logprobs = True
        """Whether scores are expectations (True) or the numbers answered (False): one or the other for a whole run."""
        if preflight:
            self._preflight()

    @torch.no_grad()
    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score B samples, `concurrency` at a time."""
        media = as_media(media)
        self.endpoint.stopped.clear()
        pool = ThreadPoolExecutor(max_workers=self.concurrency, thread_name_prefix="vlm")
        try:
            told = list(pool.map(self._score, media, [prompt.text for prompt in prompts]))
        except BaseException:
            self.endpoint.stopped.set()  # threads that sleep between two tries give up, so that Ctrl-C ends the run
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        values = torch.tensor([math.nan if isinstance(score, str) else score for score in told], device=media.device)
        return Scores(values, ~values.isnan(), causes=Counter(score for score in told if isinstance(score, str)))

    def stop(self) -> None:
        """No further tries: whoever waits for this judge has given up."""
        self.endpoint.stopped.set()

    def to(self, device: Any) -> VLMReward:
        """The model runs elsewhere: nothing moves."""
        return self

    def body(self, sample: Tensor, text: str) -> dict[str, Any]:
        """The request about one sample (F, 3, H, W) with the prompt `text`."""
        count = min(len(sample), self.frames)
        chosen = [int((i + 0.5) * len(sample) / count) for i in range(count)]
        pictures = [base64.b64encode(to_png(frame)).decode("ascii") for frame in to_bytes(sample[chosen])]
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pictures
        ]
        content.append({"type": "text", "text": self.rubric.replace("{prompt}", text)})
        body = {**self.fields, "messages": [{"role": "user", "content": content}]}
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {key: value for key, value in (body | self.overrides).items() if value is not None}

    def _score(self, sample: Tensor, text: str) -> float | str:
        """The score, or the cause why there is none."""
        try:
            answer = Answer.read(self.endpoint.post(self.body(sample, text)))
            return score_answer(answer, self.scale, expected=self.logprobs)
        except ScoreError as error:
            return str(error)
        except Exception as error:  # costs this sample its score, not its neighbours
            return describe(error)

    def _preflight(self) -> None:
        """Ask about a grey picture: finds a wrong URL, key or model, and whether log-probabilities come."""
        grey = torch.full((1, 3, 64, 64), 0.5)
        refused = ""
        try:
            try:
                answer = Answer.read(self.endpoint.post(self.body(grey, "a grey square")))
            except ScoreError as error:
                # Some servers refuse to be asked for log-probabilities, others leave them out of the answer.
                if error.status not in (400, 422):
                    raise
                self.logprobs, refused = False, f" ({error})"
                answer = Answer.read(self.endpoint.post(self.body(grey, "a grey square")))
        except ScoreError as error:
            raise RewardError(f"the vlm judge's preflight failed: {error}; {_remedy(error.status)}.") from error
        if answer.tokens is None or refused:
            self.logprobs = False
            told = "the vlm judge gets no log-probabilities from %s%s: scores are the numbers it answers"
            _log.warning(told, self.endpoint.url, refused)


def score_answer(answer: Answer, scale: tuple[int, int], *, expected: bool = True) -> float:
    """The expectation over the scale's digits, or with `expected=False` the number written. ScoreError for neither."""
    text, number = find_number(answer.text, scale)
    if answer.cut and text.strip() != number.group("number"):
        raise ScoreError("the answer was cut off at the token limit: ask for the number alone, or raise max_tokens")
    value = float(number.group("number"))
    if not scale[0] <= value <= scale[1]:
        raise ScoreError(f"the model's number is outside the scale {scale[0]} to {scale[1]}")
    if not expected:
        return value
    if not re.fullmatch("[0-9]", number.group("number")):
        raise ScoreError("the model's number is not a single digit")
    if answer.tokens is None:
        raise ScoreError("the server left out the log-probabilities")
    # From the end: a server that hides the model's thoughts may still list their tokens.
    spelled = b"".join(token for token, _ in answer.tokens)
    start = spelled.rfind(text.strip().encode("utf-8", "replace"))
    if start < 0:
        raise ScoreError("the log-probabilities are of other tokens than the answer's")
    indent = len(text) - len(text.lstrip())
    place = start + len(text[indent : number.start("number")].encode("utf-8", "replace"))
    for token, alternatives in answer.tokens:
        if place < len(token):
            return expectation(token, alternatives, scale)
        place -= len(token)
    raise ScoreError("the log-probabilities are of other tokens than the answer's")


def find_number(text: str, scale: tuple[int, int]) -> tuple[str, re.Match[str]]:
    """The answer proper (what follows the model's thoughts) and the one number in it; `4/5` counts as the number 4."""
    if "<think>" in text and "</think>" not in text:
        raise ScoreError("the answer was cut off within the model's thoughts: raise max_tokens")
    text = text.rpartition("</think>")[2]
    pattern = rf"(?P<number>[-+]?[0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*{scale[1]}(?![0-9]))?"
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ScoreError(f"the model's answer holds {'no number' if not found else 'several numbers'}")
    return text, found[0]


def expectation(token: bytes, alternatives: Mapping[bytes, float], scale: tuple[int, int]) -> float:
    """sum of d * p(d) over the digits of the scale, p renormalised over those listed.

    An alternative counts as a digit where it reads like `token` with another digit in its place, spaces aside.
    """
    around = re.sub(rb"[0-9]", b"#", token, count=1).strip()
    logs: dict[int, list[float]] = {}
    for other, log_prob in alternatives.items():
        digits = re.findall(rb"[0-9]", other)
        if len(digits) != 1 or re.sub(rb"[0-9]", b"#", other).strip() != around:
            continue
        if scale[0] <= int(digits[0]) <= scale[1]:
            logs.setdefault(int(digits[0]), []).append(log_prob)
    if not logs:
        raise ScoreError("no digit of the scale is among the log-probabilities")
    top = max(max(values) for values in logs.values())
    mass = {digit: sum(math.exp(value - top) for value in values) for digit, values in logs.items()}
    return sum(digit * share for digit, share in mass.items()) / sum(mass.values())


def _rubric(rubric: str | None, path: str | None) -> str:
    if (rubric is None) == (path is None):
        raise RewardError("the vlm judge needs one rubric: give `rubric`, or `rubric_file` with the path of a text.")
    if path is not None:
        try:
            rubric = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(f"rubric_file={path!r} cannot be read ({error}): name a UTF-8 text file.") from error
    text = str(rubric)
    odd = next(_placeholders(text), None)
    if odd:
        raise RewardError(f"the vlm judge's rubric has the placeholder {odd}: only {{prompt}} is filled in.")
    if not text.strip():
        raise RewardError("the vlm judge's rubric is empty: write what to judge and on which scale.")
    return text


def _placeholders(text: str) -> Iterator[str]:
    """Words in braces that look like placeholders and are none."""
    return (word for word in re.findall(r"\{\w+\}", text) if word != "{prompt}")


def _scale(scale: Sequence[int]) -> tuple[int, int]:
    whole = isinstance(scale, Sequence) and len(scale) == 2 and all(type(end) is int for end in scale)
    if not whole or not 0 <= scale[0] < scale[1] <= 9:
        raise RewardError(
            f"scale={scale!r} of the vlm judge: give [lowest, highest], digits with 0 <= lowest < highest."
        )
    return scale[0], scale[1]


def _remedy(status: int | None) -> str:
    if status in (401, 403):
        return "name the environment variable with the key in `api_key_env`"
    if status == 404:
        return "check `url` (its path is often /v1) and `model`"
    return "start the server, or mend `url`, `model` and `request`"
