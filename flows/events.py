"""Events on the Prefect server, which automations can wait for. `cli/notifications.yaml` does.

Each is of the resource `pd-deploy.deployment.NAME`, and has a message of one line in its payload.
"""

from prefect.events import emit_event
from prefect.logging import get_run_logger

from pd_deploy.config.models import Deployment
from pd_deploy.errors import headline
from pd_deploy.records import adopted
from pd_deploy.records.adopted import AdoptedService
from pd_deploy.records.status import Verdict
from pd_deploy.steps.rollout import Rollout
from pd_deploy.steps.verify.checking import Checked

PROMOTED = "pd-deploy.generation.promoted"
ROLLED_BACK = "pd-deploy.generation.rolled-back"
QUARANTINED = "pd-deploy.generation.quarantined"
DOWN = "pd-deploy.service.down"
DEGRADED = "pd-deploy.service.degraded"
RECOVERED = "pd-deploy.service.recovered"
GAVE_UP = "pd-deploy.health.gave-up"
NEWER_TAGS = "pd-deploy.newer-tags-not-taken"
SKIPPED = "pd-deploy.nightly.skipped"


def emit(event: str, deployment: Deployment, message: str, **facts: object) -> None:
    """Emit an event; only log it if that fails, because the service does not depend on it."""
    resource = {
        "prefect.resource.id": f"pd-deploy.deployment.{deployment.name}",
        "prefect.resource.name": deployment.name,
    }
    severity = "info" if event in (PROMOTED, RECOVERED) else "warning"
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


def back_on_adopted(failed: Rollout, reason: str) -> None:
    """Tell that a generation failed, and that the service which it was to replace serves again."""
    message = f"{reason}; the service is back on {adopted.SHOWN}, {failed.attempt.downtime}"
    emit(ROLLED_BACK, failed.session.deployment, message, **_facts(failed), serving=adopted.SHOWN)


def quarantined(failed: Rollout, error: BaseException) -> None:
    """Tell that no nightly run will take an image again."""
    message = f"{failed.release.chosen_image} is in quarantine: {headline(error)}"
    emit(QUARANTINED, failed.session.deployment, message, **_facts(failed))


def down(rollout: Rollout, error: BaseException) -> None:
    """Tell that nothing serves, and that nothing more is tried."""
    message = f"nothing serves: {headline(error)}"
    emit(DOWN, rollout.session.deployment, message, **_facts(rollout))


def adopted_down(deployment: Deployment, service: AdoptedService, error: BaseException) -> None:
    """Tell that nothing serves, as a service that was taken over does not come back."""
    message = f"nothing serves: {headline(error)}"
    emit(DOWN, deployment, message, generation=adopted.SHOWN, image=service.image)


def degraded(deployment: Deployment, checked: Checked) -> None:
    """Tell that a service does not serve as it should."""
    message = f"{checked.word}: {_line(checked.told)}"
    emit(DEGRADED, deployment, message, **_of_check(checked))


def recovered(deployment: Deployment, checked: Checked, how: str) -> None:
    """Tell that a service of which trouble was told serves as it should again."""
    facts = {**_of_check(checked), "verdict": str(Verdict.SERVING)}
    emit(RECOVERED, deployment, f"serves again: {_line(how)}", **facts)


def gave_up(deployment: Deployment, checked: Checked, why: str) -> None:
    """Tell that health does not try any more to mend a service."""
    message = f"{checked.word}: {_line(checked.told)}; {why}"
    emit(GAVE_UP, deployment, message, **_of_check(checked))


def _of_check(checked: Checked) -> dict[str, object]:
    return {
        "verdict": checked.word,
        "generation": checked.look.status.generation,
        "image": checked.look.status.image,
        "failed": sorted(checked.failed),
        "away": checked.away,
    }


def _line(text: str) -> str:
    return " ".join(text.split())


def _facts(rollout: Rollout) -> dict[str, str]:
    return {
        "generation": rollout.plan.generation,
        "image": rollout.release.chosen_image,
        "digest": rollout.release.digest,
    }
