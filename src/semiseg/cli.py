"""The command line: parses, calls the API, prints. Exit codes: 0 done, 1 the input is wrong, 2 usage, 130 and 143 interrupted."""

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from semiseg.types import InputError, Interrupted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Semi-supervised semantic segmentation: from many images and few masks to a model.",
)

RunFolder = Annotated[Path, typer.Argument(help="A run folder, a model folder, or an exported .onnx file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    force: Annotated[bool, typer.Option(help="Replace an existing recipe.")] = False,
) -> None:
    """Looks at a folder and writes a recipe for it, every choice with its reason."""
    from semiseg.files import write_text
    from semiseg.plan import plan

    if out.exists() and not force:
        raise InputError(f"{out} exists: choose another -o, or --force to replace it.")
    text = plan(folder, hours)
    write_text(out, text)
    print(text, end="")
    print(f"\nwritten to {out}; next: semiseg check {out}")


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="A recipe or a folder.")],
    sheet: Annotated[Path, typer.Option(help="Where the picture of drawn samples goes.")] = Path("check.png"),
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Pairs, sizes, mask values, class counts, leaks, duplicates, and a picture of a drawn batch; exit 1 if unusable."""
    from semiseg import api

    report = api.check(source, sheet, overrides or [])
    print(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def train(
    source: Annotated[Path, typer.Argument(help="A recipe, or a folder (a recipe is written for it first).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, such as method=supervised train.steps=600")
    ] = None,
    hours: Annotated[float, typer.Option(help="For a folder: how long the training may take.")] = 1.0,
) -> None:
    """Trains, or goes on where the same command was stopped."""
    from semiseg import api

    model = api.train(source, out, overrides=overrides or [], hours=hours)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    _print_results(results)
    print(f"model: {model.folder}; next: semiseg predict {out} IMAGES --out masks --overlay")


def _print_results(results: dict[str, Any]) -> None:
    if results["split"] is None:
        print("There is no val or test split, so there is no score.")
        return
    print(f"{results['split']} mIoU {100 * results['miou']:.2f} on {results['images']} images ({results['delivered']})")
    _print_classes(results["per_class"])
    if results["note"]:
        print(f"note: {results['note']}")


def _print_classes(per_class: dict[str, float | None]) -> None:
    width = max(map(len, per_class))
    for name, value in per_class.items():
        absent = value is None or value != value  # noqa: PLR0124  NaN
        print(f"  {name:<{width}}  {'absent' if absent or value is None else f'{100 * value:6.2f}'}")


@app.command()
def evaluate(
    model: RunFolder,
    data: Annotated[Path | None, typer.Option(help="A recipe or folder; else the run's own data.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    as_json: Json = False,
) -> None:
    """mIoU, IoU of each class, and with --json the confusion matrix."""
    from semiseg import api
    from semiseg.files import finite

    scores = api.evaluate(model, data, split)
    if as_json:
        confusion = scores.confusions.sum(0).tolist()
        values = {"split": split, "miou": scores.miou, "per_class": scores.per_class, "absent": scores.absent}
        print(json.dumps(finite(values | {"images": len(scores.names), "confusion": confusion})))
        return
    print(f"{split} mIoU {100 * scores.miou:.2f} on {len(scores.names)} images")
    _print_classes(dict(scores.per_class))
    if scores.absent:
        print(f"left out of the mean, as no mask has them: {', '.join(scores.absent)}")


@app.command()
def predict(
    model: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the masks.")],
    confidence: Annotated[bool, typer.Option("--confidence", help="Write 8-bit confidence maps too.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Write the masks over the images too.")] = False,
) -> None:
    """Masks of files or folders, at the images' own sizes; a second call goes on where the first stopped."""
    from semiseg import api

    done, there, failed = api.predict(model, images, out, confidence, overlay)
    print(f"{done} masks written to {out}" + (f", {there} were there before" if there else ""))
    for reason in failed.values():
        print(f"error: {reason}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; what differs in seeds only is averaged.")],
    as_json: Json = False,
) -> None:
    """One table of runs: mean, spread, paired differences to the first with intervals, minutes, memory."""
    from semiseg import api
    from semiseg.engine.compare import as_markdown, as_plain

    lines = api.compare(runs)
    print(json.dumps(as_plain(lines)) if as_json else as_markdown(lines))


@app.command()
def export(
    model: RunFolder,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file; else model.onnx in the model's folder.")
    ] = None,
    format: Annotated[str, typer.Option(help="onnx")] = "onnx",  # noqa: A002
) -> None:
    """Writes the model as ONNX with dynamic batch and size, runs it, and compares it with torch."""
    from semiseg import api

    if format != "onnx":
        raise InputError(f"--format {format} is unknown: onnx is there.")
    path, agreement = api.export(model, out)
    print(f"{path}: {agreement}")


@app.command()
def methods(as_json: Json = False) -> None:
    """The methods, each with its paper, its options and their defaults."""
    from semiseg.methods import DEFAULT, METHODS, describe

    if as_json:
        print(json.dumps({name: describe(method) for name, method in METHODS.items()}))
        return
    for name, method in METHODS.items():
        print(f"{name}{' (default)' if name == DEFAULT else ''}: {method.paper}")
        for option, (default, text) in describe(method).items():
            print(f"  method.{option} = {default}" + (f"  # {text}" if text else ""))


def main() -> None:
    """Runs the command line and exits with its code."""
    # An exception of ours: typer would turn KeyboardInterrupt into exit code 1. While training, the session answers instead.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)


def _stop(number: int, _: FrameType | None) -> None:
    raise Interrupted(128 + number, "stopped")


if __name__ == "__main__":
    main()
