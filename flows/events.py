"""Events on the Prefect server, which automations can wait for. `cli/notifications.yaml` does.

Each is of the resource `pd-deploy.deployment.NAME`, and has a message of one line in its payload.
"""

from prefect.events import emit_event
from prefect.logging import get_run_logger

from pd_deploy.config.models import Deployment
from pd_deploy.errors import headline
from pd_deploy.steps.rollout import Rollout

PROMOTED = "pd-deploy.generation.promoted"
ROLLED_BACK = "pd-deploy.generation.rolled-back"
QUARANTINED = "pd-deploy.generation.quarantined"
DOWN = "pd-deploy.service.down"
NEWER_TAGS = "pd-deploy.newer-tags-not-taken"
SKIPPED = "pd-deploy.nightly.skipped"


def emit(event: str, deployment: Deployment, message: str, **facts: object) -> None:
    """Emit an event; only log it if that fails, because the service does not depend on it."""
    resource = {
        "prefect.resource.id": f"pd-deploy.deployment.{deployment.name}",
        "prefect.resource.name": deployment.name,
    }
    severity = "info" if event == PROMOTED else "warning"
    try:
        payload = {"severity": severity, "message": message, **facts}
        emit_event(event=event, resource=resource, payload=payload)
    except Exception as fault:
        get_run_logger().warning("the event %s was not emitted: %s", event, fault)


def promoted(rollout: Rollout) -> None:
    """Tell that another generation serves."""
    down = f", {rollout.attempt.downtime}" if rollout.attempt.downtime.since else ""
    image = rollout.release.chosen_image
    message = f"generation {rollout.plan.generation} serves, on {image}{down}"
    emit(PROMOTED, rollout.session.deployment, message, **_facts(rollout))


def rolled_back(failed: Rollout, back: Rollout, reason: str) -> None:
    """Tell that a generation failed, and that the one before serves again."""
    serving = back.plan.generation
    message = f"{reason}; the service is back on {serving}, {back.attempt.downtime}"
    emit(ROLLED_BACK, failed.session.deployment, message, **_facts(failed), serving=serving)


def quarantined(failed: Rollout, error: BaseException) -> None:
    """Tell that no nightly run will take an image again."""
    message = f"{failed.release.chosen_image} is in quarantine: {headline(error)}"
    emit(QUARANTINED, failed.session.deployment, message, **_facts(failed))


def down(rollout: Rollout, error: BaseException) -> None:
    """Tell that nothing serves, and that nothing more is tried."""
    message = f"nothing serves: {headline(error)}"
    emit(DOWN, rollout.session.deployment, message, **_facts(rollout))


def _facts(rollout: Rollout) -> dict[str, str]:
    return {
        "generation": rollout.plan.generation,
        "image": rollout.release.chosen_image,
        "digest": rollout.release.digest,
    }
