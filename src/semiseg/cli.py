"""The command line: parses, calls the API, prints.

Exit codes: 0 done, 1 the input is wrong, 2 usage, 130 and 143 interrupted.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version as installed
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from semiseg.types import InputError, Interrupted


class _Group(typer.core.TyperGroup):
    """Lets `Interrupted` pass: typer would make an exit of its own, without our sentence, of a KeyboardInterrupt."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(stopped.code)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Semi-supervised semantic segmentation: from many images and few masks to a model.",
)

# What takes seconds to import is imported by the verb that needs it.

Trained = Annotated[Path, typer.Argument(help="A run folder, a model folder, or an exported .onnx file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options, such as method=supervised train.steps=600."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Window = Annotated[
    int | None, typer.Option(min=1, help="See images in windows of this side in px, where memory is short.")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"semiseg {installed('semiseg')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    pass


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for scenes, runs and pictures.")] = Path("demo")) -> None:
    """Synthetic scenes, labelled-only against semi-supervised: a table and pictures."""
    from semiseg.demo import demo as run_demo

    run_demo(out)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A folder with images/ and masks/.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The recipe to write.")] = Path("recipe.yaml"),
    hours: Annotated[float, typer.Option(help="How long the training may take on this machine.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
) -> None:
    """Look at a folder and write a recipe for it, every choice with its reason."""
    if out.exists() and not force:
        raise InputError(f"{out} is there already: choose another -o, or replace it by --force.")
    from semiseg.files import write_text
    from semiseg.plan import plan

    text = plan(folder, hours)
    write_text(out, text)
    print(text)
    print(f"written to {out}\nnext: semiseg check {out}, then semiseg train {out} --out runs/{folder.resolve().name}")


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="A recipe, a run, or a folder.")],
    overrides: Overrides = None,
    sheet: Annotated[Path, typer.Option(help="Where the picture of drawn samples goes.")] = Path("check.png"),
) -> None:
    """Look for what would spoil a run; exit 1 if the data is unusable.

    Pairs, sizes, mask values, class counts, leaks, duplicates, and a picture of drawn training samples.
    """
    from semiseg import api

    report = api.check(source, sheet, overrides or [])
    print(report.text())
    if report.problems:
        raise typer.Exit(1)
    print(f"no problem found; samples as the training sees them: {sheet}")


@app.command()
def train(
    source: Annotated[Path, typer.Argument(help="A recipe, or a folder, for which a recipe is made first.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder.")],
    overrides: Overrides = None,
    hours: Annotated[
        float | None, typer.Option(help="For a folder: how long the training may take. [default: 1]")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Train so many times: the verdict then covers the noise of training.")
    ] = None,
) -> None:
    """Train, or go on where the same command was stopped.

    The labelled-only model is trained beside a semi-supervised one (baseline=false omits it), and the better one kept.
    """
    if hours is not None and source.is_file():
        raise InputError(f"--hours plans the steps for a folder, and {source} is a recipe: set train.steps there.")
    from semiseg import api

    texts = [*(overrides or []), *([] if seeds is None else [f"seeds={seeds}"])]
    model = api.train(source, out, overrides=texts, hours=1.0 if hours is None else hours)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    _print_results(results)
    print(f"model: {model.folder}\nnext: semiseg predict {out} IMAGES --out masks --overlay")


def _print_results(results: Mapping[str, Any]) -> None:
    # A run that was finished before there were verdicts has none.
    verdict = results["verdict"] if "verdict" in results else None
    if results["split"] is None:
        print(f"no image is held out, so there is no score; delivered: {results['delivered']}")
    else:
        images = f"{results['images']} {results['split']} images"
        score = "not known, as no mask has a class" if results["miou"] is None else f"{100 * results['miou']:.2f}"
        whose = f" of {results['method']}" if verdict and not verdict["wins"] else ""
        stages = results.get("stages") or {}
        if len(stages) > 1 and all(stages.values()):
            print("val mIoU of the stages: " + ", ".join(f"{n} {100 * s['miou']:.2f}" for n, s in stages.items()))
        print(f"{results['split']} mIoU{whose} {score} on {images}; delivered: {results['delivered']}")
        _print_classes(results["per_class"])
        missed = [name for name, value in results["per_class"].items() if value == 0]
        if missed:
            print(
                f"no pixel right: {', '.join(missed)}. Train longer, from pretrained weights, or with more masks of it."
            )
    if results["note"]:
        print(f"note: {results['note']}")
    if verdict:
        print(f"verdict: {verdict['words']}\n{verdict['why']}")
    if results["skipped"]:
        print(f"unlabelled images that could not be read: {len(results['skipped'])}, named in results.json")
    print(f"{timedelta(seconds=round(results['seconds']))} of training, at most {results['peak_gb']:.1f} GB")


def _print_classes(per_class: Mapping[str, float | None]) -> None:
    """IoU in per cent; NaN, or null in JSON, where no mask shows the class."""
    width = max(map(len, per_class))
    for name, value in per_class.items():
        known = "in no mask, left out of the mean" if value is None or math.isnan(value) else f"{100 * value:6.2f}"
        print(f"  {name:<{width}}  {known}")


@app.command()
def evaluate(
    model: Trained,
    data: Annotated[Path | None, typer.Option(help="A recipe or folder; else the run's own data.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test. [default: test; all of a folder that is not divided]")
    ] = None,
    window: Window = None,
    as_json: Json = False,
) -> None:
    """Print mIoU and the IoU of each class; with --json the confusion matrix too."""
    from semiseg import api
    from semiseg.files import finite

    scores = api.evaluate(api.load(model, window=window), data, split)
    if as_json:
        confusion = scores.confusions.sum(0).tolist()
        values = {"split": scores.split, "miou": scores.miou, "per_class": scores.per_class, "absent": scores.absent}
        print(json.dumps(finite(values | {"images": len(scores.names), "confusion": confusion})))
        return
    what, images = (
        ("", f"all {len(scores.names)} images that have a mask")
        if scores.split == "all"
        else (f"{scores.split} ", f"{len(scores.names)} images")
    )
    print(f"{what}mIoU {100 * scores.miou:.2f} on {images}")
    _print_classes(scores.per_class)


@app.command()
def predict(
    model: Trained,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the masks.")],
    confidence: Annotated[bool, typer.Option("--confidence", help="Write 8-bit confidence maps too.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Write the masks over the images too.")] = False,
    window: Window = None,
) -> None:
    """Write masks of files or folders, at the images' own sizes; a second call goes on where the first stopped."""
    from semiseg import api

    done, there, failed = api.predict(api.load(model, window=window), images, out, confidence, overlay)
    print(f"{done} masks written to {out}" + f"; {there} were there before" * (there > 0))
    for reason in failed.values():
        print(f"error: {reason}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; what differs in seeds and folds only is averaged.")],
    per_class: Annotated[bool, typer.Option("--per-class", help="Print a table of the classes too.")] = False,
    as_json: Json = False,
) -> None:
    """Print one table of runs: mean, spread, paired differences to the first with intervals, minutes, memory.

    With --json the classes are always there, each with its difference and interval.
    """
    from semiseg import api
    from semiseg.engine.compare import as_markdown, as_plain

    lines = api.compare(runs)
    print(json.dumps(as_plain(lines)) if as_json else as_markdown(lines, per_class))


@app.command()
def export(
    model: Trained,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file; else model.onnx in the model's folder.")
    ] = None,
    format: Annotated[str, typer.Option(help="onnx")] = "onnx",  # noqa: A002
) -> None:
    """Write the model as ONNX with dynamic batch and size, run it, and compare it with torch."""
    if format != "onnx":
        raise InputError(f"--format {format} is unknown: choose onnx.")
    from semiseg import api

    path, agreement = api.export(model, out)
    print(f"{path}: {agreement}")


@app.command()
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Show these with their options.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods with their papers; of those that are named, the options and their defaults too."""
    from semiseg.methods import DEFAULT, METHODS, describe, find

    chosen = {name: find(name) for name in names or METHODS}
    if as_json:
        print(json.dumps({name: describe(method) for name, method in chosen.items()}))
        return
    for name, method in chosen.items():
        print(f"{name}{' (default)' if name == DEFAULT else ''}: {method.paper}")
        if names:
            _print_options(describe(method), "  method.")
    if not names:
        print("\nThe options of one: semiseg methods NAME")


@app.command()
def options(
    sections: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION]...", help="data, network, optim, train or evaluate.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the options of a recipe with their defaults; those of a method: `semiseg methods NAME`."""
    from semiseg.config import describe
    from semiseg.types import InputError, nearest

    known = describe()
    names = list(dict.fromkeys(name.partition(".")[0] for name in known))
    for section in sections or ():
        if section == "method":
            raise InputError("The options of a method are listed by `semiseg methods NAME`.")
        if section not in names:
            raise InputError(f"{section} is no section of a recipe; {nearest(section, names)}")
    chosen = {name: text for name, text in known.items() if name.partition(".")[0] in (sections or names)}
    if as_json:
        print(json.dumps(chosen))
        return
    _print_options(chosen)


def _print_options(found: Mapping[str, tuple[str, str]], before: str = "") -> None:
    for option, (default, text) in found.items():
        print(f"{before}{option} = {default}" + (f"  # {text}" if text else ""))


def main() -> None:
    """Runs the command line and exits with its code."""
    rank = int(os.environ.get("RANK", "0"))  # not from parallel: it would import torch
    if rank > 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - of several processes one speaks
    # In training the session answers instead.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except InputError as error:
        print(f"error: {f'in process {rank}: ' * (rank > 0)}{error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stopped:  # before a verb has begun
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


def _stop(number: int, _: FrameType | None) -> None:
    raise Interrupted.by(number, "Stopped.")


if __name__ == "__main__":
    main()
