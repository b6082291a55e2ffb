"""Whose the files of a run's folder are, what may go on from them, and what is settled before the first step."""

import contextlib
import json
import math
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from damage import damaged
from safetensors.torch import save

from sparc_kernels import AlignedSAE, SparcAdam, cli
from sparc_kernels.cli import train as train_command
from sparc_kernels.distributed import processes
from sparc_kernels.io.atomic import read_json, write_json
from sparc_kernels.io.run_checkpoints import checkpoints, load_checkpoint, load_latest, save_checkpoint
from sparc_kernels.io.weights import export_official, load_model, save_weights
from sparc_kernels.train import trainer as train_trainer
from sparc_kernels.train.config import TrainConfig
from sparc_kernels.train.folder import read_manifest
from sparc_kernels.train.trainer import Trainer

ROWS, WIDTHS = 128, {"a": 12, "b": 8}
SMALL = dict(n_latents=24, k=3, auxk=4, batch_size=32, epochs=3, lr=3e-3, dead_steps_threshold=5, reinit_every=5)
STEPS = 12


def streams() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {s: torch.randn(ROWS, d, generator=g) for s, d in WIDTHS.items()}


def trainer(out: Path | None = None, data=None, model=None, **options) -> Trainer:
    """Options of TrainConfig and of Trainer, mixed."""
    names = TrainConfig.__dataclass_fields__
    config = TrainConfig(**(SMALL | {key: options.pop(key) for key in list(options) if key in names}))
    return Trainer(config, data or streams(), out, model=model, **{"device": "cpu", "quiet": True} | options)


def model_of(**changes) -> AlignedSAE:
    torch.manual_seed(1)
    names = ("n_latents", "k", "auxk", "dead_steps_threshold")
    return AlignedSAE(**{"d_streams": WIDTHS} | {name: SMALL[name] for name in names} | changes)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A run with checkpoints after 4, 8 and 12 steps."""
    out = tmp_path_factory.mktemp("runs") / "ended"
    trainer(out, checkpoint_every=4, keep=9).train()
    return out


@pytest.fixture
def copy(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def forget_ids(out: Path) -> None:
    """The folder as it was left before runs had ids."""
    manifest = read_manifest(out / "manifest.json")
    for key in ("run", "optimizer", "init"):
        del manifest[key]
    (out / "manifest.json").write_text(json.dumps(manifest))
    for path in checkpoints(out / "checkpoints"):
        state = load_checkpoint(path)
        del state["run"], state["loss"]
        rewrite(path, state)


def rewrite(path: Path, state: dict) -> None:
    save_checkpoint(path.parent, int(path.stem.split("-")[1]), state, keep=99)


def files(folder: Path) -> list[str]:
    """Feature files as arguments of the command."""
    for s, x in streams().items():
        np.save(folder / f"{s}.npy", x.numpy())
    return [f"--stream={s}={folder / s}.npy" for s in WIDTHS]


def command(out: Path, *more: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    return ["train", f"--out={out}", "--device=cpu", *flags, *more]


# ------------------------------------------------------------------------------------------------- whose checkpoints


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_their_manifest_are_nobodys(copy, resume):
    (copy / "manifest.json").unlink()
    for name in ("log.csv", "model.safetensors"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match=r"out: expected a new folder, or the manifest.json of the run that wrote "
                       r"step-000000004.pt, got .*step-000000004.pt without one"):  # fmt: skip
        trainer(copy, resume=resume, epochs=1)


def test_a_checkpoint_of_another_run_is_refused(copy, tmp_path):
    other = tmp_path / "other"
    trainer(other, epochs=2).train()
    stale = shutil.copy(copy / "checkpoints" / "step-000000012.pt", other / "checkpoints")
    with pytest.raises(ValueError, match=f"checkpoint {stale}: expected one of the run that manifest.json describes, "
                       "got one of another run"):  # fmt: skip
        trainer(other, epochs=2, resume=True)
    forget_ids(other)
    with pytest.raises(ValueError, match=rf"checkpoint {stale}: expected one of the run's 8 steps, got step 12"):
        trainer(other, epochs=2, resume=True)
    state = load_checkpoint(Path(stale))
    rewrite(Path(stale), state | {"model_config": state["model_config"] | {"k": 2}})
    with pytest.raises(ValueError, match=rf"model's k: expected 2 as in {stale}, got 3"):
        trainer(other, epochs=2, resume=True)


def test_a_run_from_before_ids_resumes_to_the_same_bits(ended, copy):
    (copy / "checkpoints" / "step-000000012.pt").unlink()
    (copy / "model.safetensors").unlink()
    forget_ids(copy)
    run = trainer(copy, resume=True)
    assert run.batches == 8
    run.train()
    assert (copy / "model.safetensors").read_bytes() == (ended / "model.safetensors").read_bytes()
    assert trainer(copy, resume=True).batches == STEPS


def test_a_checkpoint_that_was_just_written_stays(tmp_path):
    """Behind damaged ones of later steps, over which resuming has passed."""
    for step in (5, 8, 9):
        save_checkpoint(tmp_path, step, {"x": step}, keep=3)
    for step in (8, 9):
        (tmp_path / f"step-{step:09d}.pt").write_bytes(b"damaged")
    save_checkpoint(tmp_path, 7, {"x": 7}, keep=1)
    path, _ = load_latest(tmp_path, lambda text: None)
    assert path.name == "step-000000007.pt" and not (tmp_path / "step-000000005.pt").exists()


def test_final_weights_without_a_checkpoint_are_not_trained_over(copy):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint to go on from, got .*safetensors alone"):
        trainer(copy, resume=True, epochs=9)


# -------------------------------------------------------------------------------------------------- nothing was trained


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("shuffle", ["window", "none"])
def test_a_stream_of_zeros_is_refused_before_training(tmp_path, capsys, share, shuffle):
    given = files(tmp_path)
    x = streams()["b"].numpy()
    x[: int(share * ROWS)] = 0
    np.save(tmp_path / "b.npy", x)
    assert cli.main([*command(tmp_path / "run", *given), f"--shuffle={shuffle}"]) == 2
    text = capsys.readouterr().err
    assert (
        f"stream 'b' ({tmp_path}/b.npy): expected few zero rows (max_skipped 100), got" in text
        and "of 12 batches would be" in text
    )
    assert not (tmp_path / "run").exists()


def test_zero_rows_that_share_batches_are_trained_around():
    data = streams()
    data["b"][:32] = 0
    assert trainer(data=data, shuffle="none").train()["skipped"] == 3  # of 12: the first of every epoch


@pytest.mark.parametrize(("rate", "rows"), [(3e-3, slice(0, ROWS, 40)), (1e30, slice(0, 0))])
def test_a_run_that_did_not_train_ends_badly(tmp_path, capsys, rate, rows):
    """Zero rows in every batch, which no estimate foresaw; a rate that breaks the weights at once."""
    given = files(tmp_path)
    x = streams()["b"].numpy()
    x[rows] = 0
    np.save(tmp_path / "b.npy", x)
    settings = [f"--lr={rate}", "--shuffle=none", "--batch-size=64", "--quiet"]
    assert cli.main([*command(tmp_path / "run", *given), *settings]) == 1
    text = capsys.readouterr().err
    assert re.search(r"stopped: no final weights: \d of 6 batches had a loss that is not finite", text)
    assert not (tmp_path / "run" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ files of other people


def test_files_of_the_user_stay(copy):
    """Resuming deletes what a killed run was writing, and nothing else."""
    names = ("notes.tmp", "log.csv.tmp", "checkpoints/mine.tmp", ".lock")
    for name in names:
        (copy / name).write_text("mine")
    remains = [copy / f"{name}.7.tmp" for name in ("model.safetensors", ".space", "checkpoints/step-000000004.pt")]
    for path in remains:
        path.write_text("unfinished")
    trainer(copy, resume=True).train()
    assert [(copy / name).read_text() for name in names] == ["mine"] * 4
    assert not any(path.exists() for path in remains)


OURS = ["log.csv", "model.safetensors", "msae_checkpoint.pth", "run_config.json", "checkpoints"]


@pytest.mark.parametrize("name", OURS)
def test_a_new_run_writes_over_nothing(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"out: expected a new folder, .* that wrote {name}"):
        trainer(tmp_path, export=True)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["msae_checkpoint.pth", "run_config.json"])
def test_a_run_that_exports_later_writes_over_nothing(copy, name):
    (copy / name).write_text("mine")
    with pytest.raises(
        ValueError, match=f"export: expected a folder without {name}, got {copy / name}, which this run"
    ):
        trainer(copy, resume=True, export=True)
    assert (copy / name).read_text() == "mine"
    trainer(copy, resume=True)  # writes neither
    (copy / name).unlink()
    for _ in range(2):  # the second time over its own
        trainer(copy, resume=True, export=True).train()
    assert load_model(copy / "msae_checkpoint.pth")[0].k == 3


def test_a_log_that_is_not_the_runs_stays(copy):
    (copy / "log.csv").write_text("date,weight\n2026,70\n")
    with pytest.raises(ValueError, match=r"log.csv: expected the log of this run, with columns step, .* move it"):
        trainer(copy, resume=True).start()
    assert (copy / "log.csv").read_text() == "date,weight\n2026,70\n"
    (copy / "log.csv").write_bytes(b"x" * 200_000 + b"\0")  # more than a field may have
    with pytest.raises(ValueError, match=r"log.csv: expected the log of this run"):
        trainer(copy, resume=True).start()


# ------------------------------------------------------------------------------------------------------ NumPy's numbers


def test_settings_may_be_numpys(tmp_path):
    """A run with them saves, is resumed, and its weights load."""
    numbers = {int: np.int64, float: np.float32, bool: np.bool_, str: np.str_}
    settings = {name: numbers[type(value)](value) for name, value in vars(TrainConfig(**SMALL)).items()}
    widths = {np.str_(s): np.int64(d) for s, d in WIDTHS.items()}
    model = AlignedSAE(
        widths, *(settings[n] for n in ("n_latents", "k", "auxk", "auxk_threshold", "dead_steps_threshold")),
        topk_type=settings["topk_type"],
    )  # fmt: skip
    config = TrainConfig(**settings)
    assert {type(value) for value in vars(config).values()} == {int, float, bool, str}
    options = {"full_check": np.bool_(True), "keep": np.int64(2), "export": True, "device": "cpu", "quiet": True}
    Trainer(config, streams(), tmp_path, model=model, **options).train()
    assert json.loads((tmp_path / "manifest.json").read_text())["config"] == vars(config)
    assert Trainer(config, streams(), tmp_path, resume=np.bool_(True), **options).batches == STEPS
    assert load_model(tmp_path)[0].d_streams == WIDTHS
    assert load_model(checkpoints(tmp_path / "checkpoints")[-1])[0].k == 3
    save_weights(model, tmp_path / "again.safetensors", np.bool_(False))
    assert load_model(tmp_path / "again.safetensors")[1] is False
    export_official(model, tmp_path, {"lr": np.float32(0.5), "seed": np.int64(1)})
    assert json.loads((tmp_path / "run_config.json").read_text())["args"]["lr"] == 0.5


def test_an_optimizer_of_numpys_numbers_saves_pythons(tmp_path):
    """Also where a scheduler or the caller puts them later."""
    numbers = dict(lr=np.float32(1e-3), betas=(np.float32(0.5), np.float64(0.25)), eps=np.float16(1e-3),
                   weight_decay=np.int64(0), max_grad_norm=np.float32(2), normalize=np.str_("after"),
                   capturable=np.bool_(False))  # fmt: skip
    model = AlignedSAE(WIDTHS, 16, 3)
    optimizer = SparcAdam(model, **numbers)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step)
    model.compute_loss(model(streams()), streams())[0].backward()
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["eps"] = np.array(0.5)
    assert type(optimizer.param_groups[0]["lr"]) is not float
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    group = torch.load(tmp_path / "a.pt", weights_only=True)["param_groups"][0]
    expected = dict(numbers, lr=np.float32(1e-3) / 2, eps=0.5)
    assert {name: group[name] for name in expected} == expected
    SparcAdam(model).load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got \(0.5, np.float32\(1.0\)\)"):
        SparcAdam(model, betas=(0.5, np.float32(1)))


def test_a_run_with_an_optimizer_of_numpys_numbers_is_resumed(tmp_path):
    def run(**options) -> Trainer:
        return trainer(tmp_path, optimizer=lambda m: torch.optim.Adam(m.parameters(), np.float64(1e-3)), **options)

    first = run()
    first.optimizer.param_groups[0]["initial_lr"] = np.float64(1e-3)
    first.train()
    assert run(resume=True).batches == STEPS


# ------------------------------------------------------------------------------------------------------- a given model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auxk": None}, "model's auxk: expected 4 as in the config, got None"),
        ({"k": 2}, "model's k: expected 3 as in the config, got 2"),
        ({"n_latents": 30}, "model's n_latents: expected 24"),
        ({"topk_type": "local"}, "model's topk_type: expected 'global' as in the config, got 'local'"),
        ({"auxk_threshold": 0.0}, "model's auxk_threshold: expected 0.001 as in the config, got 0.0"),
        ({"dead_steps_threshold": 9}, "model's dead_steps_threshold: expected 5"),
        ({"dtype": torch.float64}, r"model: expected parameters of torch.float32, .* got torch.float64"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_a_model_of_other_settings_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "run", model=model_of(**changes))
    assert not (tmp_path / "run").exists()


def test_a_model_of_the_settings_is_trained(tmp_path):
    trainer(tmp_path, model=model_of()).train()
    trainer(model=model_of(auxk=None), auxk=0).train()
    assert load_model(tmp_path)[0].k == 3


def test_the_model_of_the_manifest_is_checked_when_resuming(tmp_path, capsys):
    """Manifests were written whose settings are not their model's."""
    out, given = tmp_path / "run", files(tmp_path)
    assert cli.main([*command(out, *given), "--quiet"]) == 0
    forget_ids(out)
    manifest = read_manifest(out / "manifest.json")
    for key, value, words in (("k", 2, "expected 2"), ("topk_type", "local", "expected 'local'")):
        (out / "manifest.json").write_text(json.dumps(manifest | {"model": manifest["model"] | {key: value}}))
        assert cli.main(["train", f"--out={out}", "--resume", "--device=cpu"]) == 2
        assert f"model's {key}: {words} as in {out}/manifest.json" in capsys.readouterr().err


def test_another_optimizer_is_refused_when_resuming(copy):
    with pytest.raises(ValueError, match="optimizer: expected SparcAdam as when the run began, got Adam"):
        trainer(copy, resume=True, optimizer=lambda model: torch.optim.Adam(model.parameters()))


def test_a_trainer_writes_nothing_before_it_starts(tmp_path, copy):
    trainer(tmp_path / "new", export=True)
    assert not (tmp_path / "new").exists()
    (copy / "checkpoints" / "step-000000012.pt.7.tmp").write_text("unfinished")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    trainer(copy, resume=True, epochs=5)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_of_two_trainers_of_a_folder_the_first_to_start_has_it(tmp_path):
    first, second = trainer(tmp_path / "run"), trainer(tmp_path / "run", k=2)
    second.train()
    with pytest.raises(ValueError, match=r"out: expected the folder as the Trainer found it, got .* another run"):
        first.train()
    assert load_model(tmp_path / "run")[0].k == 2


# ------------------------------------------------------------------------------------------ what the end of a run needs


def test_a_missing_package_is_known_before_the_first_step(tmp_path, capsys, monkeypatch):
    given = files(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert cli.main(command(tmp_path / "run", *given)) == 2
    error = capsys.readouterr().err
    assert "model.safetensors, a safetensors file, needs safetensors: pip install safetensors\n" in error
    assert not (tmp_path / "run").exists()
    trainer().train()  # nothing is saved, nothing is needed
    with pytest.raises(ValueError, match="log_to: expected some of tensorboard, wandb, got 'tensorbord'"):
        trainer(log_to=("tensorbord",))


# ------------------------------------------------------------------------------------------------ going on from an end


@pytest.mark.parametrize("shuffle", ["window", "official"])
def test_a_run_that_ended_goes_on_to_more_steps(tmp_path, shuffle):
    """As one that was as long from the beginning."""
    settings = {"shuffle": shuffle, "memory": 40_000, "checkpoint_every": 5}
    trainer(tmp_path / "long", epochs=7, **settings).train()
    out = tmp_path / "run"
    trainer(out, epochs=3, max_steps=10, **settings).train()
    trainer(out, epochs=5, resume=True, **settings).train()
    run = trainer(out, epochs=7, resume=True, **settings)
    assert run.batches == 20
    run.train()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "long" / "model.safetensors").read_bytes()
    manifest = read_manifest(out / "manifest.json")
    assert (manifest["config"]["epochs"], manifest["config"]["max_steps"]) == (7, 0)
    entries = [{key: entry[key] for key in ("after_step", "epochs", "max_steps")} for entry in manifest["extended"]]
    assert entries == [{"after_step": 10, "epochs": 5, "max_steps": 0}, {"after_step": 20, "epochs": 7, "max_steps": 0}]
    with pytest.raises(ValueError, match="epochs, max_steps: expected at least the 28 steps that the run had, got 20"):
        trainer(out, epochs=5, resume=True, **settings)
    with pytest.raises(ValueError, match="epochs, max_steps: expected at least the 28 steps that the run had, got 9"):
        trainer(out, epochs=9, max_steps=9, resume=True, **settings)


def test_a_folder_loads_what_is_newest_in_it_and_whole(copy, caplog):
    def stop(step, *_):
        if step == 16:
            raise KeyboardInterrupt

    def loaded() -> dict:
        return load_model(copy)[0].state_dict()

    def same(one: dict, other: dict) -> bool:
        return all(torch.equal(one[name], other[name]) for name in other)

    final = load_model(copy / "model.safetensors")[0].state_dict()
    assert same(loaded(), final) and not caplog.messages
    with pytest.raises(KeyboardInterrupt):
        trainer(copy, resume=True, epochs=9, checkpoint_every=3, keep=9, on_step=stop).train()
    path = checkpoints(copy / "checkpoints")[-1]
    newer = load_checkpoint(path)["model"]
    assert same(loaded(), newer) and not same(newer, final)
    assert caplog.messages == [f"Note: {path} is loaded, since {copy}/model.safetensors is older, of step 12"]
    (copy / "unfinished").mkdir()
    (copy / "unfinished" / "checkpoints").symlink_to(copy / "checkpoints")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for folder in (copy, copy / "unfinished"):  # with final weights of step 12, and with that checkpoint alone
        caplog.clear()
        assert same(load_model(folder)[0].state_dict(), final)
        assert caplog.messages[0].startswith(f"Skipped: checkpoint {folder}/checkpoints/{path.name}: expected a compl")
    path.write_bytes(content)

    def spoil(*_):
        run.model.encoders["a"].weight.detach().fill_(math.nan)

    run = trainer(copy, resume=True, epochs=9, keep=9, on_step=spoil)
    with pytest.raises(
        train_trainer.TrainingStopped, match=r"no final weights \(model.safetensors is of an earlier step\): 20 "
    ):
        run.train()
    checkpoints(copy / "checkpoints")[-1].unlink()
    trainer(copy, resume=True, epochs=9).train()
    caplog.clear()
    assert same(loaded(), load_model(copy / "model.safetensors")[0].state_dict()) and not caplog.messages


def test_the_command_extends_a_run_and_starts_from_weights(tmp_path, capsys):
    out, given = tmp_path / "run", files(tmp_path)
    assert cli.main(command(out, *given)) == 0
    text = capsys.readouterr().out
    assert re.search(rf"Saved model.safetensors in {out}, loss \d\.\d{{4}} after 12 steps", text)
    assert f"sparc-kernels eval --model {out} --stream a=FILE --stream b=FILE" in text.splitlines()[-1]
    assert cli.main(["train", f"--out={out}", "--resume", "--device=cpu", "--epochs=4"]) == 0
    text = capsys.readouterr().out
    assert "Note: the run had 12 steps and now has 16" in text and "Resuming after step 12 of 16" in text
    assert cli.main(["train", f"--out={out}", "--resume", "--device=cpu"]) == 0
    assert re.search(r"loss \d\.\d{4} after 16 steps", capsys.readouterr().out)  # of a run with nothing left to do

    tuned, short = tmp_path / "tuned", ["--epochs=1", "--batch-size=32", "--device=cpu", "--quiet"]
    begin = ["train", f"--out={tuned}", f"--init={out}", "--k=2", "--no-normalize", *given, *short]
    assert cli.main(begin[:-1]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note")]
    assert notes == [f"Note: {key}, where the model was trained with {had}" for key, had in (("k 2", 3),
                     ("normalize False", True))]  # fmt: skip
    manifest = read_manifest(tuned / "manifest.json")
    assert manifest["init"] == str(out)
    model = manifest["model"]
    assert (model["n_latents"], model["k"], model["auxk"], model["dead_steps_threshold"]) == (24, 2, 4, 5)
    weights = [load_model(folder)[0].encoders["a"].weight for folder in (out, tuned)]
    assert 0 < (weights[0] - weights[1]).abs().max() < 4 * 1.1e-4  # four steps at the default rate from there
    shutil.rmtree(tuned / "checkpoints")
    (tuned / "model.safetensors").unlink()
    assert cli.main(["train", f"--out={tuned}", "--resume", "--device=cpu"]) == 2
    assert f"init: expected {out} as when the run began, for it has no checkpoint, got none" in capsys.readouterr().err
    assert cli.main([*begin, "--resume"]) == 0
    assert torch.equal(load_model(tuned)[0].encoders["a"].weight, weights[1])
    assert cli.main([*begin, "--resume", f"--init={tuned}"]) == 2
    assert f"init: expected {out} as when the run began, got {tuned}" in capsys.readouterr().err
    assert cli.main([*begin, f"--out={tmp_path / 'x'}", "--n-latents=20"]) == 2
    error = capsys.readouterr().err
    assert f"model {out}/model.safetensors: expected n_latents 20, got weights of n_latents 24" in error


def test_a_launcher_that_says_too_little_is_named(tmp_path, capsys, monkeypatch):
    given = files(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(command(tmp_path / "run", *given)) == 2
    assert "environment variable RANK expected, but not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_restart_by_torchrun_resumes_what_this_torchrun_began(tmp_path, capsys, monkeypatch):
    given = command(tmp_path / "run", *files(tmp_path))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert cli.main(given) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert cli.main([*given, "--epochs=9"]) == 2
        assert "out: expected a folder without a run, or resume" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert cli.main(given) == 0
    assert "Resuming after step 12 of 12" in capsys.readouterr().out
    manifest = read_json(tmp_path / "run" / "manifest.json")
    del manifest["launch"], manifest["sha256"], manifest["run"]  # as runs before had it
    write_json(tmp_path / "run" / "manifest.json", manifest)
    assert read_manifest(tmp_path / "run" / "manifest.json") == manifest and cli.main(given) == 2


def test_a_restart_that_another_machine_counts_resumes(tmp_path, monkeypatch):
    """torchrun counts restarts by machine: of two, one may be at its first attempt."""
    shared = []

    class Both(processes.Processes):
        def share(self, value):
            if not isinstance(value, bool):
                return [value]
            shared.append(value)
            return [value, True]

    given = command(tmp_path / "run", *files(tmp_path))
    monkeypatch.setattr(train_command, "join", lambda device, **limits: Both(torch.device("cpu"), 9, 9, launch="x"))
    monkeypatch.setattr(train_trainer, "join", train_command.join)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert cli.main(given) == cli.main(given) == 0 and shared[0] is False


@pytest.mark.parametrize("flag", ["lost-after", "hangs-after"])
def test_seconds_are_checked_before_anything_is_watched(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.setattr(processes, "Processes", None)
    assert cli.main(command(tmp_path / "run", *files(tmp_path), f"--{flag}=-1")) == 2
    assert f"{flag.replace('-', '_')}: expected a finite number >= 0, got -1.0" in capsys.readouterr().err


def test_attempts_meet_whatever_their_stores_have_kept():
    """Ranks of an attempt find each other; what earlier ones asked, were answered and heard has no effect."""
    store, attempts = dist.HashStore(), 3
    store.set_timeout(timedelta(seconds=20))
    with ThreadPoolExecutor(3) as pool:
        names = []
        for attempt in range(attempts):
            store.set("asks/1", f"gone {attempt}")  # one that asked and was killed
            others = [pool.submit(processes.meet, store, rank, 3) for rank in (1, 2)]
            names.append({processes.meet(store, 0, 3), *(other.result() for other in others)})
    assert all(len(ours) == 1 for ours in names) and len(set.union(*names)) == attempts


def test_what_is_not_as_it_was_is_told(copy, caplog, monkeypatch):
    caplog.set_level("INFO", "sparc_kernels")
    now = train_trainer.versions()
    monkeypatch.setattr(train_trainer, "versions", lambda: now | {"torch": "9.9"})
    trainer(copy, resume=True, quiet=False)
    assert f"Note: torch 9.9 ({now['torch']} when the run began); results may differ" in caplog.text
    forget_ids(copy)
    manifest = read_manifest(copy / "manifest.json")
    (copy / "manifest.json").write_text(json.dumps(manifest | {"device": "NVIDIA H100", "threads": 96}))
    path = checkpoints(copy / "checkpoints")[-1]
    rewrite(path, load_checkpoint(path) | {"fresh_state": torch.zeros(16, dtype=torch.uint8)})  # a GPU generator's
    trainer(copy, resume=True, quiet=False)
    text = caplog.text
    assert "Note: device cpu (NVIDIA H100 when the run began), threads 1 (96 when the run began), torch 9.9" in text
    assert "Resuming after step 12 of 12" in text


# ------------------------------------------------------------------------------------------------------------ damage


def test_a_configuration_that_is_no_object_is_named(tmp_path):
    path = export_official(model_of(), tmp_path)
    for content, words in (("[1, 2]", "expected a JSON object, got a list"), ("{", "expected a JSON file"),
                           ('{"args": [1]}', "expected settings as a JSON object .*, got a list")):  # fmt: skip
        (tmp_path / "run_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"run_config.json: {words}"):
            load_model(path)
    for k in ('"x"', "25"):
        (tmp_path / "run_config.json").write_text(f'{{"args": {{"k": {k}, "topk_type": "local"}}}}')
        with pytest.raises(ValueError, match=rf"model {path}: k: expected an int in 1\.\.24"):
            load_model(path)
    weights = tmp_path / "model.safetensors"
    for said, words in (("[1]", "expected its settings as a JSON object, got a list"), ("{", "expected a complete")):
        weights.write_bytes(save(model_of().decoder_layout_("contiguous").state_dict(), {"sparc_kernels": said}))
        with pytest.raises(ValueError, match=f"model {weights}: {words}"):
            load_model(weights)


def test_damaged_manifests_and_checkpoints_are_refused_or_read_right(ended, copy):
    """Damaged bytes; values replaced where no digest tells: by name, never from below."""
    generator = np.random.default_rng(0)
    path = copy / "checkpoints" / "step-000000012.pt"
    whole = {file: file.read_bytes() for file in (copy / "manifest.json", path)}
    said = read_manifest(copy / "manifest.json")
    weights = load_model(path)[0].state_dict()
    for older in checkpoints(copy / "checkpoints")[:-1]:
        older.unlink()

    def read(file):
        try:
            run = trainer(copy, resume=True)
        except ValueError as error:
            text = str(error)
            assert str(file) in text or "as when the run began" in text, text
            return 1
        assert run.batches == STEPS and all(torch.equal(run.model.state_dict()[n], w) for n, w in weights.items())
        return 0

    refused = 0
    for i in range(50):
        file = list(whole)[i % 2]
        file.write_bytes(damaged(whole[file], generator))
        refused += read(file)
        with contextlib.suppress(ValueError):  # the command takes its settings from there
            assert read_manifest(copy / "manifest.json") == said
        file.write_bytes(whole[file])
    assert refused >= 40

    forget_ids(copy)
    manifest, state = json.loads((copy / "manifest.json").read_text()), load_checkpoint(path)
    for value in (None, "x", {"a": {"a": 1}}, torch.zeros(3)):
        for key in state:
            if key not in ("kind", "step", "sums") or value is None:
                rewrite(path, state | {key: value})
                read(path)
        for key in manifest if not isinstance(value, torch.Tensor) else ():
            rewrite(path, state)
            (copy / "manifest.json").write_text(json.dumps(manifest | {key: value}))
            read(copy / "manifest.json")
        (copy / "manifest.json").write_text(json.dumps(manifest))
