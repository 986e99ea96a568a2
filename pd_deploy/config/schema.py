"""The JSON schema of a deployment file, for editors. Pure.

It is more lenient than loading the file: it knows keys, values and short forms, and no rule that
ties keys together. `pd-deploy check` decides.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from pd_deploy.config.models import DERIVED, Deployment

DIALECT = GenerateJsonSchema.schema_dialect
_EXTENDS = {
    "description": "A deployment file whose keys this one has, unless it has its own; null removes "
    "one.",
    "type": "string",
}
# What parsers take in place of the value itself, such as `0-7` for devices.
_SHORT_FORM = {"type": ["string", "number", "boolean", "array"]}


def of_file() -> dict[str, Any]:
    """Make the schema."""
    schema = Deployment.model_json_schema(schema_generator=_Lenient)
    for key in DERIVED:
        del schema["properties"][key]
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    relaxed: dict[str, Any] = _relaxed(schema)
    return {"$schema": DIALECT, **relaxed, "title": "pd-deploy deployment file"}


class _Lenient(GenerateJsonSchema):
    """Takes the short form of what has a parser of its own."""

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """Take the value itself, or a short form of it."""
        return {"anyOf": [super().function_before_schema(schema), _SHORT_FORM]}


def _relaxed(schema: Any) -> Any:
    """Require no key, as the profile or another file may have it; allow null, which removes one."""
    if isinstance(schema, list):
        return [_relaxed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {key: _relaxed(value) for key, value in schema.items() if key != "required"}
    if isinstance(schema.get("properties"), dict):
        relaxed["properties"] = {
            key: {"anyOf": [_relaxed(value), {"type": "null"}]}
            for key, value in schema["properties"].items()
        }
    if isinstance(schema.get("additionalProperties"), dict):
        entry = _relaxed(schema["additionalProperties"])
        relaxed["additionalProperties"] = {"anyOf": [entry, {"type": "null"}]}
    return relaxed
