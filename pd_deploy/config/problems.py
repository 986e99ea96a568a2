"""Pydantic's validation errors, reworded for the file's author. Pure."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pd_deploy.config.fields import shown
from pd_deploy.config.models import DERIVED
from pd_deploy.errors import Problem

# Pydantic's type of error → what was expected.
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} entry",
    "invalid_key": "a key that is text",
}


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Turn a validation error into problems with key paths; suggest a key for an unknown one."""
    return [
        Problem(_key(detail["loc"]), _message(detail, model))
        for detail in error.errors(include_url=False)
    ]


def _key(location: tuple[int | str, ...]) -> str:
    """Join the path of a key, without what pydantic adds for itself."""
    return ".".join(
        str(part) for part in location if not str(part).startswith(("function-", "[key]"))
    )


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"], model)
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return message if "found" in message else f"{message}, found {shown(value)}"
    if kind == "json_invalid":
        return f"not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}"
    expected = _EXPECTED.get(kind)
    if expected is None:
        return f"{detail['msg']}, found {shown(value)}"
    return f"expected {expected.format(**detail.get('ctx', {}))}, found {shown(value)}"


def _unknown_key(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = _known_keys(location[:-1], model)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    if near:
        return f"is not a known key; did you mean {near[0]}?"
    return f"is not a known key; expected {', '.join(known)}" if known else "is not a known key"


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """List the keys that the file may have at a location."""
    model: Any = root
    for part in location:
        field = model.model_fields.get(part) if _is_model(model) else None
        model = _model_in(field.annotation) if field else model
        if model is None:
            return []
    return [key for key in model.model_fields if key not in DERIVED]


def _model_in(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    models = (_model_in(arg) for arg in get_args(annotation))
    return next((model for model in models if model), None)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)
