"""The command line: parse, call, print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dancegrpo.errors import DanceError

app = typer.Typer(
    name="dancegrpo",
    help="Reinforcement learning for visual generation: train a diffusers pipeline to please a judge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted settings, `rollout.group_size=16`.")
]
JudgeOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="The judge's settings as in a recipe, `options.batch_size=8`."),
]
Which = Annotated[
    str, typer.Option("--checkpoint", help="Of a run: `latest`, `best` on held-out prompts, or after N iterations.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def main() -> None:
    """Runs the command; a user's mistake is one line and exit code 2."""
    # The libraries' notices (a fallback for want of torchvision) are no news to whoever types a command.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        app()
    except DanceError as error:
        _complain(" ".join(str(error).split()))
        sys.exit(2)
    except OSError as error:  # a disk that is full or closed to us, where nothing nearer said so
        _complain(f"{error.filename or 'a file'}: {error.strerror or error}; free space or check its rights")
        sys.exit(2)


def _complain(line: str) -> None:
    try:
        print(f"dancegrpo: {line}", file=sys.stderr, flush=True)
    except OSError:  # a log on the very disk that is full: the exit code still tells
        sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - what is left in the old ones fails at exit


def _print(result: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(result, indent=1) if as_json else text)


@app.command(epilog="Example: `dancegrpo train shapes-flux iterations=50 optimizer.learning_rate=2e-5`")
def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe (`dancegrpo recipes`) or a YAML file.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one under `runs/`.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder to go on with; `auto`: what --out holds, or else start there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, or go on with a run (`--resume RUN_DIR`)."""
    from dancegrpo.trainer import train as run

    settings = list(overrides or [])
    if recipe is not None and resume is not None and "=" in recipe:
        # With --resume the recipe may be left out, so the first word can be an override.
        settings, recipe = [recipe, *settings], None
    result = run(recipe, overrides=settings, out=out, resume=resume)
    if not result.main:
        return  # one of several processes speaks for all
    told: dict[str, Any] = {"run_dir": str(result.run_dir), "report": str(result.report)}
    told["iterations"] = result.iterations
    told["verdict"] = result.verdict
    _print(told, f"run:    {result.run_dir}\nreport: {result.report}", as_json)
    if result.verdict is not None:
        _complain(result.verdict)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun would start again what is to end
            raise typer.Exit(1)


@app.command(
    epilog='Example: `dancegrpo sample runs/shapes-flux-seed0 --prompt "a red circle" --count 4 --out pictures`'
)
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a recipe for its untrained pipeline.")],
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; may be given several times.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures or clips per prompt.")] = 4,
    seed: Annotated[int, typer.Option(help="Key of the starting noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for them.")] = Path("samples"),
    form: Annotated[
        Literal["png", "webp", "mp4"] | None,
        typer.Option("--format", help="By default png for pictures, mp4 for clips; webp holds both without loss."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="The picture that an image-to-video model animates, for every --prompt.")
    ] = None,
    checkpoint: Which = "latest",
    as_json: AsJson = False,
) -> None:
    """Draw pictures or clips with the deterministic sampler, from a run's weights or a recipe's base."""
    from dancegrpo.inference import draw

    shown: Any = {"count": count, "seed": seed, "out": out, "form": form, "image": image}
    files = draw(source, list(prompt or []), **shown, checkpoint=checkpoint)
    _print({"files": [str(file) for file in files]}, "\n".join(map(str, files)), as_json)


@app.command(
    name="make-images",
    epilog="Example: `dancegrpo make-images prompts.txt model.path=/models/FLUX.1-dev --model flux-hps --out frames`",
)
def make_images(
    prompts: Annotated[str, typer.Argument(help="What to draw: any form that `prompts.train` takes.")],
    model: Annotated[str, typer.Option(help="A run folder, or a recipe for its untrained pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their `prompts.jsonl`.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Key of the starting noise.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, the first.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the reference images of image-to-video with a text-to-image pipeline; a second call goes on from a first."""
    from dancegrpo.reference_images import make_images as make

    file = make(prompts, model, list(overrides or []), seed=seed, limit=limit, out=out)
    _print({"prompts": str(file)}, str(file), as_json)


@app.command(name="eval", epilog="Example: `dancegrpo eval runs/shapes-flux-seed0 evaluation.num_prompts=1200`")
def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, or a recipe for its untrained pipeline.")],
    overrides: Overrides = None,
    checkpoint: Which = "latest",
    as_json: AsJson = False,
) -> None:
    """Measure held-out prompts with fixed noise and the deterministic sampler; a run is compared with its start."""
    from dancegrpo.inference import measure

    result, table = measure(source, list(overrides or []), checkpoint=checkpoint)
    _print(result, table, as_json)


@app.command(
    epilog="Example: `dancegrpo reproduce table2` or `dancegrpo reproduce all --seeds 3 --results docs/results`"
)
def reproduce(
    study: Annotated[str, typer.Argument(help="table2, table5, figure5, ..., all, or a YAML file (docs/studies.md).")],
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1 of every arm.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the runs and their logs.")] = Path("reproduce"),
    results: Annotated[
        Path | None, typer.Option(help="Folder of the results kept of them and of the pages; by default --out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time; by default one per core.")] = None,
    rerun: Annotated[bool, typer.Option("--rerun", help="As if there were no results yet.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Run nothing: print the table of the results.")] = False,
    as_json: AsJson = False,
) -> None:
    """Re-run a comparison of the paper in miniature and write its page; a second call goes on from a first."""
    from rich.console import Console

    from dancegrpo.studies import markdown_tables, studies_named
    from dancegrpo.studies import reproduce as run

    chosen = studies_named(study)
    if markdown:
        print(markdown_tables(chosen, results or out))
        return
    console = Console(stderr=True)
    outcome = run(
        chosen,
        seeds=seeds,
        out=out,
        results=results,
        workers=workers,
        rerun=rerun,
        say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    pages = [str(page) for page in outcome.pages]
    _print({"pages": pages, "failures": outcome.failures}, "\n".join([*pages, *outcome.failures]), as_json)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


@app.command(epilog="Example: `dancegrpo report runs/shapes-flux-seed0`")
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    as_json: AsJson = False,
) -> None:
    """Write (again) a run's self-contained HTML report."""
    from dancegrpo.report import write_report
    from dancegrpo.run_folder import RunFolder

    path = write_report(RunFolder.open(run_dir).path)
    _print({"report": str(path)}, str(path), as_json)


@app.command(epilog="Example: `dancegrpo compare runs/shapes-flux-seed0 runs/shapes-flux-seed0-2 --out compare.html`")
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
    as_json: AsJson = False,
) -> None:
    """Overlay two or more runs on one page: settings, held-out scores, pictures, curves; the first is the yardstick."""
    from dancegrpo.report.compare import as_json as told
    from dancegrpo.report.compare import as_table, compare_runs

    result = compare_runs(run_dirs, out)
    _print(told(result), as_table(result), as_json)


@app.command(epilog="Example: `dancegrpo recipes` or `dancegrpo recipes flux-hps`")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe's resolved settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes, or show one with all its settings."""
    from dancegrpo.config import dump_config, list_recipes, load_config

    if name is not None:
        config = load_config(name)
        _print(config.model_dump(mode="json"), dump_config(config).rstrip(), as_json)
        return
    known = list_recipes()
    width = max(len(recipe.name) for recipe in known)
    told = {"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in known]}
    _print(told, "\n".join(f"{recipe.name:{width}}  {recipe.description}" for recipe in known), as_json)


@app.command(epilog="Example: `dancegrpo export runs/shapes-flux-seed0 --out my-pipeline`")
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run folder with a checkpoint.")],
    out: Annotated[Path, typer.Option(help="A new folder for the pipeline or the LoRA weights.")],
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="Take the moving average where the run kept one.")] = True,
    checkpoint: Which = "latest",
    as_json: AsJson = False,
) -> None:
    """Write a run's weights as a diffusers pipeline (or LoRA weights) with a model card."""
    from dancegrpo.inference import export as write

    path = write(run_dir, out, ema=ema, checkpoint=checkpoint)
    _print({"export": str(path)}, str(path), as_json)


@app.command(epilog="Example: `dancegrpo validate shapes-flux` or `dancegrpo validate DIR model.policy=my_port:Mine`")
def validate(
    model: Annotated[str, typer.Argument(help="A pipeline's folder, a shipped pipeline, or a hub id.")],
    overrides: Overrides = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the smallest the family accepts.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the smallest the family accepts.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; by default the shortest.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps from noise to picture.")] = 4,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Key of all noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check that a model trains as it samples: equal to its pipeline, replayed exactly, exported whole."""
    from dancegrpo.validate import as_json as told
    from dancegrpo.validate import as_table
    from dancegrpo.validate import validate as run

    size = {"height": height, "width": width, "frames": frames, "steps": steps, "dtype": dtype, "device": device}
    result = run(model, list(overrides or []), seed=seed, **size)
    _print(told(result), as_table(result), as_json)
    if not result.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: `dancegrpo doctor` or `dancegrpo doctor flux-hps-lora --memory 80 --price-per-hour 2`")
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe or a YAML file; without one, the machine alone.")
    ] = None,
    overrides: Overrides = None,
    memory: Annotated[
        float | None, typer.Option(help="Plan for an accelerator of so many GB, instead of this machine's device.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="So many share the run; one GPU of them is predicted.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Plan with so many 10^12 operations per second reached, without calibration.")
    ] = None,
    network: Annotated[float | None, typer.Option(help="GB per second that a GPU receives from the others.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of one device, in any currency: the cost.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what the machine has, what a recipe lacks, and whether its run would fit, before anything is loaded."""
    from dancegrpo.doctor import Plan, diagnose
    from dancegrpo.doctor.text import as_json as told
    from dancegrpo.doctor.text import as_table

    plan = Plan(memory, gpus, tflops, network, price_per_hour)
    found = diagnose(recipe, list(overrides or []), plan)
    _print(told(found), as_table(found), as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: `dancegrpo score hps --media pictures --prompts prompts.txt options.batch_size=8`")
def score(
    judge: Annotated[str, typer.Argument(help="A shipped judge (`dancegrpo rewards`) or `package.module:function`.")],
    media: Annotated[
        list[Path], typer.Option(help="A picture, a clip, or a folder of them; may be given several times.")
    ],
    overrides: JudgeOverrides = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt file with one prompt per file, in their order.")] = None,
    column: Annotated[str, typer.Option(help="The field of a prompt file that holds the text.")] = "text",
    prompt: Annotated[str | None, typer.Option(help="One prompt for all.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the scores to this CSV file too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score pictures or clips with a judge."""
    from dancegrpo.files import write_text
    from dancegrpo.judging import as_csv, as_table, score_files
    from dancegrpo.judging import as_json as told

    rows = score_files(judge, list(overrides or []), media, prompts=prompts, column=column, prompt=prompt)
    _print(told(rows), as_table(rows), as_json)  # first: whatever becomes of the file, the scores are not lost
    if csv is not None:
        write_text(csv, as_csv(rows))
    if all(row.value is None for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: `dancegrpo rewards`")
def rewards(as_json: AsJson = False) -> None:
    """List the judges: what each measures, what it needs, and whether its weights are here."""
    from dataclasses import asdict

    from dancegrpo.judging import judges_table, list_judges

    known = list_judges()
    _print({"judges": [asdict(judge) for judge in known]}, judges_table(known), as_json)


@app.command(name="serve-reward", epilog="Example: `dancegrpo serve-reward hps --port 8765 options.device=cuda`")
def serve_reward(
    judge: Annotated[str, typer.Argument(help="A shipped judge (`dancegrpo rewards`) or `package.module:function`.")],
    overrides: JudgeOverrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one, printed.")] = 8765,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that clients must show.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with that token, instead.")] = None,
    max_request_mb: Annotated[float, typer.Option(help="Larger requests are refused.")] = 256,
    batch_across_requests: Annotated[
        bool, typer.Option(help="Pack the samples of several requests into one batch; off = each on its own, exactly.")
    ] = True,
) -> None:
    """Run a judge as a service of its own, for `judge: service` of recipes in other processes or on other machines."""
    from dancegrpo.config import load_reward_config
    from dancegrpo.rewards.service import read_token, serve

    config = load_reward_config(judge, list(overrides or []))
    token = read_token(token_env, token_file)
    serve(
        judge,
        config,
        host=host,
        port=port,
        token=token,
        max_request_mb=max_request_mb,
        batch_across_requests=batch_across_requests,
        # The address on standard output: port 0 is only known now, and a script may wait for this line.
        on_ready=lambda url: print(url, flush=True),
    )


if __name__ == "__main__":
    main()
