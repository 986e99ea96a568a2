"""`pd-deploy config`: the file with all that it extends, its profile's values and the defaults."""

import json
from typing import Any

import yaml

from pd_deploy.config import schema
from pd_deploy.config.models import DERIVED, Deployment


def resolved(deployment: Deployment) -> str:
    """Write a deployment as a file that stands for itself.

    What its profile sets for all servers and for each role comes as a comment: it is still the
    profile's, below the file's own `settings`.
    """
    document = deployment.model_dump(mode="json", exclude=set(DERIVED), exclude_none=True)
    of_profile = {
        str(role): settings.model_dump(mode="json", exclude_defaults=True)
        for role, settings in deployment.profile_settings.items()
    }
    comment = "".join(f"#   {line}\n" for line in _yaml(of_profile).splitlines())
    head = f"# {deployment.name}, resolved: `pd-deploy check` takes it as it is.\n"
    says = f"# Below `settings` come those of profile {deployment.profile}:\n{comment}"
    return f"{head}{_yaml(document)}{says if of_profile else ''}"


def schema_text() -> str:
    """Write the JSON schema of deployment files."""
    return json.dumps(schema.of_file(), indent=2, ensure_ascii=False)


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
