"""Memory that runs out, judges that die, disks that are full: what is said, what is kept, what is repeated."""

import json
import resource
from contextlib import contextmanager

import pytest
import torch

from dancegrpo import load_config, train
from dancegrpo.algorithms import build_algorithm
from dancegrpo.errors import CheckpointError, ConfigError, ModelError, OutOfMemoryError, RewardError
from dancegrpo.faults import MicroBatchSize, is_out_of_memory, memory_advice
from dancegrpo.policies.flux import FluxPolicy
from dancegrpo.rewards import Judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.tracking import NoTracker
from dancegrpo.update import Updater
from dancegrpo.watchdog import Place
from test_trainer import assert_same_run, settings  # noqa: F401
from toy import WORDS, Bright, ToyPolicy, toy_config


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def _no_evaluation(request):
    if "settings" in request.fixturenames:  # less to compute
        request.getfixturevalue("settings")["evaluation"] = {"samples": 0}


@contextmanager
def memory_for(kind, rows: int, monkeypatch):
    """Predictions of more than `rows` rows, with gradient, find no memory."""
    predict = kind.predict

    def limited(self, x_t, step, condition):
        if torch.is_grad_enabled() and len(x_t) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")
        return predict(self, x_t, step, condition)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "predict", limited)
        yield


def one_update(algorithm: str):
    """(metrics, weights, updater) of one toy iteration."""
    config, policy = toy_config(algorithm), ToyPolicy()
    judges = Judges({"bright": Bright()}, {"bright": 1.0})
    method = build_algorithm(config, judges)
    if method.needs_reference:
        policy.keep_reference()
    updater = Updater(policy, config)
    updater.world.place.begin("start", 3)
    media = []
    batch = method.collect(policy, policy.encode(WORDS), 0, lambda x0, told: media.append(policy.decode(x0, told)))
    drawn = [prompt for prompt in WORDS for _ in range(4)]
    scores = judges.score(torch.cat(media).detach(), drawn) if media else {}
    metrics = updater.update(method.learn(policy, batch, scores, WORDS))
    return metrics, updater.state_dict()["weights"], updater


@pytest.mark.parametrize("algorithm", ["grpo", "refl", "dpo", "nft"])
def test_an_update_short_of_memory_is_the_same_in_half_the_micro_batch(algorithm, monkeypatch):
    metrics, weights, _ = one_update(algorithm)
    with memory_for(ToyPolicy, 4, monkeypatch):
        again, smaller, updater = one_update(algorithm)
    assert updater.micro_batch.changes == [[3, 0, 4]]
    assert again.keys() == metrics.keys()
    for key, value in metrics.items():
        assert again[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key
    for name, weight in weights.items():
        torch.testing.assert_close(smaller[name], weight, atol=1e-6, rtol=1e-5)


def test_memory_short_of_half_a_micro_batch_too_is_told(monkeypatch):
    told = r"out of memory in start of iteration 3 \(2\.00 GiB more were wanted\): try model.offload=true, or .*fsdp=2"
    with memory_for(ToyPolicy, 3, monkeypatch), pytest.raises(OutOfMemoryError, match=told):
        one_update("grpo")


def test_sizes_hold_from_where_they_were_found():
    sizes, heard = MicroBatchSize(8), []
    sizes.record = lambda changes: heard.append([list(change) for change in changes])
    assert (sizes.halve(3, 1, 99), sizes.halve(7, 0, 3)) == (4, 2)
    assert [sizes.at(*step) for step in [(0, 0), (3, 0), (3, 1), (4, 0), (7, 0), (9, 1)]] == [8, 8, 4, 4, 2, 2]
    assert heard == [[[3, 1, 4]], [[3, 1, 4], [7, 0, 2]]]


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, known):
    assert is_out_of_memory(error) is known


def test_the_cpus_own_allocator_is_understood():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert "1152921504606846976 bytes more were wanted" in memory_advice(raised.value, toy_config("grpo"), Place())


@pytest.mark.parametrize(
    ("phase", "first"),
    [
        ("encode", "model.offload=true"),
        ("rollout", "rollout.batch_size=4 (now 8)"),
        ("decode", "model.vae_slicing=true"),
        ("reward", "a smaller batch_size among the judge's options"),
        ("update", "update.micro_batch_size=4 (now 7)"),
        ("evaluation", "evaluation.batch_size=32 (now 64)"),
    ],
)
def test_advice_depends_on_the_phase(phase, first):
    place = Place()
    place.begin(phase, 2)
    told = memory_advice("", toy_config("grpo"), place)
    assert told.startswith(f"out of memory in {phase} of iteration 2: try {first}")


def test_advice_leaves_out_what_is_set():
    place = Place()
    place.begin("update", 2)
    config = toy_config(
        "grpo", "update.micro_batch_size=1", "model.gradient_checkpointing=true", "model.lora={rank: 4}"
    )
    told = memory_advice("", config, place)
    assert told == (
        "out of memory in update of iteration 2: try rollout.store=host, or model.offload=true, or more processes with "
        "parallel.fsdp=2"
    )


def test_a_resumed_run_repeats_the_micro_batches_that_memory_forced(settings, tmp_path, monkeypatch):  # noqa: F811
    """Bit for bit, though this time there is memory enough: also what comes before the size was found."""
    settings |= {"iterations": 3, "update": {"updates_per_rollout": 1}}
    settings["rollout"]["timesteps"] = {"fraction": 1.0}  # 24 items
    predict, seen = FluxPolicy.predict, {"rows": 0}

    def limited(self, x_t, step, condition):
        seen["rows"] += len(x_t) if torch.is_grad_enabled() else 0
        if torch.is_grad_enabled() and len(x_t) > 4 and seen["rows"] > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return predict(self, x_t, step, condition)

    with monkeypatch.context() as patch:
        patch.setattr(FluxPolicy, "predict", limited)
        whole = train(load_config(settings), out=tmp_path / "whole").run_dir
    sizes = RunFolder(whole).info()["micro_batch_sizes"]
    assert sizes == [[1, 0, 4]]
    part = train(load_config(settings, ["iterations=0"]), out=tmp_path / "part").run_dir
    RunFolder(part).write_info(micro_batch_sizes=sizes)
    train(resume=part, overrides=["iterations=3"])
    assert_same_run(whole, part)


def test_a_rollout_short_of_memory_says_so_and_loses_nothing(settings, tmp_path, monkeypatch):  # noqa: F811
    settings |= {"iterations": 3, "checkpoint": {"every": 10}}
    whole = train(load_config(settings), out=tmp_path / "whole").run_dir
    predict, calls = FluxPolicy.predict, {"rollouts": 0}

    def limited(self, x_t, step, condition):
        if not torch.is_grad_enabled():
            calls["rollouts"] += int(step[0]) == 0
            if calls["rollouts"] == 2 + 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        return predict(self, x_t, step, condition)

    with monkeypatch.context() as patch:
        patch.setattr(FluxPolicy, "predict", limited)
        told = (
            r"out of memory in rollout of iteration 2 \(4096 bytes more were wanted\): try rollout.batch_size=4 \(now"
        )
        with pytest.raises(OutOfMemoryError, match=told):
            train(load_config(settings), out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000002"]
    train(resume=tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_a_judge_that_dies_loses_no_iteration(settings, tmp_path, algorithm):  # noqa: F811
    settings |= {"iterations": 4, "checkpoint": {"every": 10}}
    settings |= {"algorithm": {"name": algorithm}}
    calls = {"left": 3}

    def mortal(images, prompts):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise ConnectionError("nobody answers")
        return images.mean(dim=(1, 2, 3))

    def living(images, prompts):
        return images.mean(dim=(1, 2, 3))

    mortal.__qualname__ = living.__qualname__ = "judge"
    whole = train(load_config(settings), rewards={"bright": living}, out=tmp_path / "whole").run_dir
    with pytest.raises(RewardError, match="nobody answers"):
        train(load_config(settings), rewards={"bright": mortal}, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000003"]
    train(resume=tmp_path / "run", rewards={"bright": living})
    assert_same_run(whole, tmp_path / "run")


def test_half_an_update_is_not_saved(settings, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings |= {"iterations": 3, "checkpoint": {"every": 10}}
    whole = train(load_config(settings), out=tmp_path / "whole").run_dir
    update = Updater.update

    def broken(self, learning):
        if self.num_updates == 2:
            self.accumulate(learning.parts[0], learning)
            self._step()
            raise ModelError("the weights are not finite")
        return update(self, learning)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", broken)
        with pytest.raises(ModelError, match="not finite"):
            train(load_config(settings), out=tmp_path / "run")
    assert "middle of an update, which is not saved: a resumed run repeats what came after iteration 0" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(resume=tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_tracker_that_fails_loses_no_iteration(settings, tmp_path, monkeypatch):  # noqa: F811
    settings |= {"iterations": 2, "checkpoint": {"every": 10}}
    whole = train(load_config(settings), out=tmp_path / "whole").run_dir

    def broken(self, metrics, step):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(NoTracker, "log", broken)
        with pytest.raises(OSError, match="No space left"):
            train(load_config(settings), out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["000001"]
    train(resume=tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


def test_a_full_disk_leaves_no_half_line(tmp_path):
    folder, (soft, hard) = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    folder.append_metrics({"iteration": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: File too large; free space"):
            folder.append_metrics({"iteration": 1, "long": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.append_metrics({"iteration": 1})
    assert [json.loads(line)["iteration"] for line in folder.metrics_file.read_text().splitlines()] == [0, 1]


def test_resume_auto_starts_and_goes_on(settings, tmp_path):  # noqa: F811
    whole = train(load_config(settings), out=tmp_path / "whole").run_dir
    for iterations in (0, 2, 4):
        result = train(load_config(settings, [f"iterations={iterations}"]), out=tmp_path / "run", resume="auto")
        assert result.iterations == iterations
    assert_same_run(whole, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate \(0\.001 -> 0\.002\)"):
        train(load_config(settings, ["optimizer.learning_rate=2e-3"]), out=tmp_path / "run", resume="auto")
    with pytest.raises(ConfigError, match="--resume auto needs a folder to look in: name it with --out"):
        train(load_config(settings), resume="auto")


def test_memory_settings_may_change_on_resume(settings, tmp_path):  # noqa: F811
    settings |= {"iterations": 1}
    run = train(load_config(settings), out=tmp_path / "run").run_dir
    assert train(resume=run, overrides=["rollout.batch_size=4", "update.micro_batch_size=4"]).iterations == 1
