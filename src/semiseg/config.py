"""One YAML file is one experiment: read, overridden from the command line, checked, frozen."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SerializeAsAny, ValidationError, field_serializer

from semiseg import methods
from semiseg.data.splits import DataConfig
from semiseg.networks.factory import NetworkConfig, OptimConfig
from semiseg.types import InferenceConfig, InputError, Options, TrainConfig, nearest


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

    def dump(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
        plain = self.model_dump(mode="json")
        plain["method"] = {"name": self.method.name, **plain["method"]["options"]}
        return plain


SECTIONS = tuple(Recipe.model_fields)


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
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {error}.") from error
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(plain, dict):
        raise InputError(f"{path} is not a recipe: it has no sections such as data, method and train.")
    return parse(override(plain, overrides), path, path.parent)


def parse(plain: Mapping[str, Any], source: Path | str, base: Path | None = None) -> Recipe:
    """Checks plain values. `source` is named in errors; import strings of files are looked for beside `base`.

    Raises:
        InputError: an option is unknown or out of its range.
    """
    plain = dict(plain)
    chosen = plain.get("method") or {"name": methods.DEFAULT}
    if isinstance(chosen, str):
        chosen = {"name": chosen}
    if not isinstance(chosen, Mapping) or "name" not in chosen:
        raise InputError(f"{source}: method needs a name, one of {', '.join(methods.METHODS)}")
    options = {key: value for key, value in chosen.items() if key != "name"}
    config = methods.find(str(chosen["name"]), base).Config
    try:
        plain["method"] = {"name": chosen["name"], "options": config.model_validate(options)}
    except ValidationError as error:
        raise InputError(explain(error, config, f"{source}: method")) from error
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        raise InputError(explain(error, Recipe, str(source))) from error


def override(plain: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy with `section.key=value` texts applied; values are YAML (`train.crop=[128,160]`), `method=NAME` is short for its name.

    Raises:
        InputError: a text has another form.
    """
    result = {section: dict(value) if isinstance(value, Mapping) else value for section, value in plain.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        keys = name.split(".")
        if not equals or keys[0] not in SECTIONS:
            hint = nearest(keys[0], SECTIONS)
            raise InputError(
                f"{text}: an override has the form section.key=value, with one of {', '.join(SECTIONS)}; {hint}"
            )
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{text}: the value is not valid YAML.") from error
        if keys == ["method"]:
            result["method"] = {"name": parsed}  # another method: the options of the first do not fit
            continue
        if len(keys) == 1:
            raise InputError(f"{text}: name the option too, as in {keys[0]}.{next(iter(_fields(keys[0])))}=...")
        at = result
        for key in keys[:-1]:
            inner = at.get(key)
            at[key] = dict(inner) if isinstance(inner, Mapping) else {}
            at = at[key]
        at[keys[-1]] = parsed
    return result


def _fields(section: str) -> dict[str, Any]:
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return dict(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """The first mistake in one sentence: file, option, what is wrong, and for an unknown name the nearest one."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    option = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _options_at(model, place[:-1])
        return f"{source}: {option} is unknown; {nearest(place[-1], known)}."
    if first["type"] == "missing":
        return f"{source}: {option} is missing."
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{source}: {option} is {first['input']!r}, but it should be {reason}."


def _options_at(model: type[BaseModel], place: list[str]) -> list[str]:
    for key in place:
        annotation = model.model_fields[key].annotation
        models = [m for m in (annotation, *get_args(annotation)) if isinstance(m, type) and issubclass(m, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


__all__ = ["MethodConfig", "Recipe", "explain", "load_recipe", "override", "parse"]
