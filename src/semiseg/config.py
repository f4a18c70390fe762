"""One YAML file is one experiment: read, overridden from the command line, checked, frozen."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import torch
import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_serializer, model_validator
from pydantic_core import ErrorDetails

from semiseg import methods
from semiseg.data.check import class_pixels
from semiseg.data.splits import Data, DataConfig
from semiseg.networks.factory import Build, NetworkConfig, OptimConfig
from semiseg.types import InferenceConfig, InputError, Options, TrainConfig, described, nearest


class MethodConfig(Options):
    """`method: {name: ..., option: ...}`: the options are those of the named class."""

    name: str
    options: SerializeAsAny[Options]

    @field_serializer("options")
    def _plain(self, options: Options) -> dict[str, Any]:
        return options.model_dump(mode="json")


class Recipe(Options):
    """One experiment."""

    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    method: MethodConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluate: InferenceConfig = InferenceConfig()
    baseline: bool = True
    """Train the labelled-only model beside a semi-supervised one, and say whether the unlabelled images helped."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """How many trainings, with seeds from train.seed on: then the verdict's interval covers the noise of training."""

    @model_validator(mode="after")
    def _one_kind_of_several(self) -> Self:
        if self.seeds > 1 and self.data.folds is not None and self.data.fold is None:
            raise ValueError(
                "seeds and data.folds exclude each other: set seeds to 1, or data.fold to one of the folds"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
        plain = self.model_dump(mode="json")
        plain["method"] = {"name": self.method.name, **plain["method"]["options"]}
        return plain


ALONE = ("baseline", "seeds")
"""Options that stand in no section."""
SECTIONS = tuple(name for name in Recipe.model_fields if name not in ALONE)


def describe() -> dict[str, tuple[str, str]]:
    """Every option of a recipe but the method's, by its whole name, with its default and its meaning."""
    return {name: text for name, text in described(Recipe).items() if not name.startswith("method.")}


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe file and applies `section.key=value` overrides.

    Raises:
        InputError: the file is missing or not YAML, or an option is unknown or out of its range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: name a recipe (a .yaml file) or a folder with images.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder: name a recipe (a .yaml file).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: name a recipe (a .yaml file).") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name another recipe.") from error
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML ({_reason(error)}): correct it there.") from error
    if not isinstance(plain, dict):
        raise InputError(f"{path} is not a recipe: write sections such as data, method and train into it.")
    return parse(plain, path, path.parent, overrides)


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def parse(
    plain: Mapping[str, Any], source: Path | str, base: Path | None = None, overrides: Iterable[str] = ()
) -> Recipe:
    """Checks plain values after `section.key=value` overrides.

    Args:
        plain: sections with their options; an empty section stands for its defaults.
        source: named in errors.
        base: folder beside which import strings of files are looked for.
        overrides: texts as on the command line.

    Raises:
        InputError: an option is unknown or out of its range.
    """
    overrides = list(overrides)
    plain = override({section: value for section, value in plain.items() if value is not None}, overrides)
    chosen = plain["method"] if "method" in plain else {}
    chosen = {"name": chosen} if isinstance(chosen, str) else chosen
    chosen = {"name": methods.DEFAULT, **chosen} if isinstance(chosen, Mapping) else {"name": None}
    if not isinstance(chosen["name"], str):
        raise InputError(f"{source}: method has no name: give one, {' or '.join(methods.METHODS)}.")
    config = methods.find(chosen["name"], base).Config
    options = {key: value for key, value in chosen.items() if key != "name"}
    try:
        plain["method"] = {"name": chosen["name"], "options": config.model_validate(options)}
    except ValidationError as error:
        raise InputError(_explain(error, options, config, "method.", source, overrides)) from error
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise InputError(_explain(error, plain, Recipe, "", source, overrides)) from error


def override(plain: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy with `section.key=value` texts applied.

    Values are YAML (`train.crop=[128,160]`); `baseline` and `seeds` have no section. `method=NAME` stands for its name,
    and the options of another method go.

    Raises:
        InputError: a text has another form.
    """
    result = {section: dict(value) if isinstance(value, Mapping) else value for section, value in plain.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        keys = name.split(".")
        if not equals:
            raise InputError(f"{text}: an override has the form section.key=value, such as train.steps=600.")
        if name in ALONE:
            result[name] = _yaml(text, value)
            continue
        places = [section for section in SECTIONS if len(keys) == 1 and name in fields_of(section)]
        if keys[0] not in SECTIONS and places:
            raise InputError(f"{text}: name the section too, {' or '.join(f'{place}.{text}' for place in places)}.")
        if keys[0] not in SECTIONS:
            raise InputError(f"{text}: there is no section {keys[0]}; {nearest(keys[0], SECTIONS)}")
        parsed = _yaml(text, value)
        if keys == ["method"]:
            result["method"] = parsed if isinstance(parsed, Mapping) else {"name": parsed}
            continue
        if len(keys) == 1:
            raise InputError(f"{text}: name the option too, as in {keys[0]}.{next(iter(fields_of(keys[0])))}={value}.")
        if isinstance(result.get("method"), str):
            result["method"] = {"name": result["method"]}
        at = result
        for key in keys[:-1]:
            inner = at.get(key)
            at[key] = dict(inner) if isinstance(inner, Mapping) else {}
            at = at[key]
        at[keys[-1]] = parsed
    return result


def _yaml(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{text}: the value is not valid YAML ({_reason(error)}): correct it.") from error


def fields_of(section: str) -> dict[str, Any]:
    """The options of a section; those of a method belong to its own class."""
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return dict(model.model_fields)


def build_of(recipe: Recipe, data: Data, device: torch.device, base: Path | None = None) -> Build:
    """What the recipe's method makes its networks and optimisers with; `base` is the folder of the recipe."""
    return Build(
        classes=len(data.classes),
        channels=recipe.data.channels,
        config=recipe.network,
        optim=recipe.optim,
        seed=recipe.train.seed,
        precision=torch.bfloat16 if recipe.train.precision == "bf16" else None,
        channels_last=recipe.train.channels_last,
        base=base,
        device=device,
        class_pixels=lambda: class_pixels(data),
        names=data.classes,
    )


# ---- explaining --------------------------------------------------------------------------------------------------

_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a group of the form {name: value}",
    "model_type": "a group of the form {option: value}",
}
_RANGES = {
    "finite_number": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "missing": "a longer list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of {max_length}",
}
"""Words for pydantic's types of errors, where a value is of another kind, and where it is out of its range."""


def _explain(
    error: ValidationError,
    plain: Mapping[str, Any],
    model: type[BaseModel],
    prefix: str,
    source: object,
    texts: list[str],
) -> str:
    """The first mistake in one sentence: where, option, what is wrong, and for an unknown name the nearest one."""
    first = error.errors()[0]
    kind, location = first["type"], first["loc"]
    place, siblings, example = _option(model, location)
    option = prefix + ".".join(place)
    if kind == "extra_forbidden":
        option = prefix + ".".join(map(str, location))
        sentence = f"{option} is unknown; {nearest(str(location[-1]), siblings)}"
    elif kind == "value_error":
        said = first["msg"].removeprefix("Value error, ")
        # That of one option need not name it; one of a section names the options that do not fit together.
        sentence = f"{said}." if not place or option in said else f"{option} {said}."
    elif kind == "missing" and location == place:
        sentence = f"{option} is missing: write it there."
    else:
        value: Any = plain
        for name in place:
            value = value[name]
        alike = [detail for detail in error.errors() if detail["loc"][: len(place)] == place]
        wanted = _wanted(alike, len(place), example)
        sentence = f"{option} is {'empty' if value is None else repr(value)}, but {wanted}."
    # The file is right where the command line is wrong; a value error is one of a whole section.
    names = [text.partition("=")[0] for text in texts]
    by_hand = [n for n in names if f"{option}.".startswith(f"{n}.") or (kind == "value_error" and n.startswith(option))]
    return sentence if by_hand else f"{source}: {sentence}"


def _option(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[str, ...], Iterable[str], str]:
    """The part of pydantic's location that names options, before elements and members of unions.

    Returns:
        the names, those beside the last one, and its default where that is a list.
    """
    names: list[str] = []
    known, example = model.model_fields, ""
    for part in location:
        if part not in known:
            break
        field = known[str(part)]
        names.append(str(part))
        example = f" such as {list(field.default)}" if isinstance(field.default, tuple) and field.default else ""
        kinds = get_args(field.annotation) or (field.annotation,)  # those of `Group | None`, or the one
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        known = groups[0].model_fields if groups else {}
    return tuple(names), known, example


def _wanted(details: list[ErrorDetails], depth: int, example: str) -> str:
    """What an option should be. Of the members of a union those count to which the value comes nearest."""
    elements = [d for d in details if any(isinstance(part, int) or part == "[key]" for part in d["loc"][depth:])]
    inside = [d for d in elements if d["type"] != "missing"]
    words = []
    for detail in inside or [d for d in details if d["type"] in _RANGES] or details:
        kind = detail["type"]
        word = _TYPES[kind] if kind in _TYPES else _RANGES[kind].format(**detail["ctx"] if "ctx" in detail else {})
        words.append(word.replace("'", "") + example * ("list" in word))
    return f"{'each entry' if inside else 'it'} should be {' or '.join(dict.fromkeys(words))}"


__all__ = ["MethodConfig", "Recipe", "build_of", "describe", "fields_of", "load_recipe", "override", "parse"]
