"""The disk cache of conditions: the same bits, within its bound, whatever state its files are in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dancegrpo.errors import PromptError
from dancegrpo.policies import Condition, Policy, load_policy
from dancegrpo.policies.cache import CachedEncoder, ConditionCache
from dancegrpo.prompts import Prompt
from dancegrpo.settings import ModelConfig, RolloutConfig
from tiny import PROMPTS, TINY_SIZE

MEGABYTE = 1 << 20


@pytest.fixture(scope="module", params=["sd", "flux"])
def policy(request, tiny_sd_path: Path, tiny_flux_path: Path) -> Policy:
    path = tiny_sd_path if request.param == "sd" else tiny_flux_path
    config = ModelConfig(path=str(path), height=TINY_SIZE, width=TINY_SIZE, dtype="bfloat16", device="cpu")
    return load_policy(config, RolloutConfig(num_steps=3))


def some(*texts: str) -> list[Prompt]:
    return [Prompt(i, text) for i, text in enumerate(texts)]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def same(a: Condition, b: Condition) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in a.tensors
    )


def entry(value: float) -> Condition:
    return Condition({"encoder_hidden_states": torch.full((1, 64, 4), float(value))})  # 1 KiB and a header


def test_conditions_are_the_same_bits_with_and_without_a_cache(policy: Policy, tmp_path: Path) -> None:
    wanted = some(PROMPTS[0], PROMPTS[1], PROMPTS[0])
    plain = policy.encode(wanted)
    for _ in ("cold", "warm"):
        assert same(CachedEncoder(policy, ConditionCache(tmp_path, MEGABYTE)).encode(wanted), plain)
    assert same(CachedEncoder(policy, None).encode(wanted), plain)


def test_a_stored_prompt_is_not_encoded_again(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CachedEncoder(policy, ConditionCache(tmp_path, MEGABYTE)).encode(some(*PROMPTS[:2]))
    asked: list[str] = []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompts: (asked.extend(p.text for p in prompts), encode(prompts))[1])
    CachedEncoder(policy, ConditionCache(tmp_path, MEGABYTE)).encode(some(*PROMPTS))
    assert asked == [PROMPTS[2]]


def test_a_file_that_is_damaged_is_encoded_and_stored_again(policy: Policy, tmp_path: Path) -> None:
    wanted = some(PROMPTS[0])
    plain = CachedEncoder(policy, ConditionCache(tmp_path, MEGABYTE)).encode(wanted)
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    whole = file.read_bytes()
    for damaged in (b"", b"garbage", whole[:-7]):
        file.write_bytes(damaged)
        assert same(CachedEncoder(policy, ConditionCache(tmp_path, MEGABYTE)).encode(wanted), plain)
        assert file.read_bytes() == whole


def test_a_negative_prompt_and_another_model_have_keys_of_their_own() -> None:
    prompts = [Prompt(0, "a", ""), Prompt(0, "a", "b"), Prompt(0, "ab", "")]
    keys = {ConditionCache.key(model, prompt) for model in ("m", "n") for prompt in prompts}
    assert len(keys) == 6
    assert ConditionCache.key("m", Prompt(9, "a")) in keys


def test_the_cache_never_exceeds_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = ConditionCache(tmp_path, 16 * 1024)
    for i in range(40):
        cache.put(f"{i:064d}", entry(i))
        assert cache.get(f"{0:064d}") is not None  # used all the time, so never the oldest
        assert size_of(tmp_path) <= 16 * 1024
    assert cache.get(f"{39:064d}").tensors["encoder_hidden_states"].mean() == 39
    assert cache.get(f"{1:064d}") is None


def test_a_reopened_cache_counts_what_is_there(tmp_path: Path) -> None:
    for i in range(10):
        ConditionCache(tmp_path, 4096).put(f"{i:064d}", entry(i))
        assert size_of(tmp_path) <= 4096


def test_a_condition_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = ConditionCache(tmp_path, 512)
    cache.put("k" * 64, entry(1))
    assert cache.get("k" * 64) is None
    assert size_of(tmp_path) == 0


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    wanted = some(PROMPTS[0])
    assert same(
        CachedEncoder(policy, ConditionCache(tmp_path / "file", MEGABYTE)).encode(wanted), policy.encode(wanted)
    )


def test_the_reference_image_is_part_of_the_key(tmp_path: Path) -> None:
    from PIL import Image

    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "red.png")
    prompts = [
        Prompt(0, "a"),
        Prompt(0, "a", image=red),
        Prompt(0, "a", image=blue),
        Prompt(0, "a", image=tmp_path / "red.png"),
    ]
    assert len({ConditionCache.key("c", prompt) for prompt in prompts}) == 4
    assert ConditionCache.key("c", prompts[1]) == ConditionCache.key("c", Prompt(1, "a", image=red.copy()))


def test_a_lost_reference_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"gone\.png cannot be read \(No such file or directory\)"):
        ConditionCache.key("c", Prompt(0, "a", image=tmp_path / "gone.png"))
