"""`pd-deploy notify`: who is told when something happened to services."""

import asyncio
from pathlib import Path
from uuid import UUID

import typer
import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound

from pd_deploy.cli.prefect_api import served
from pd_deploy.errors import PdDeployError

AUTOMATIONS = Path(__file__).with_name("notifications.yaml")
PLACEHOLDER = "BLOCK"
NOBODY = UUID(int=0)


def automations(block_id: UUID) -> list[AutomationCore]:
    """Return the automations, which send notifications by a block."""
    text = AUTOMATIONS.read_text().replace(f": {PLACEHOLDER}", f": {block_id}")
    return [AutomationCore.model_validate(entry) for entry in yaml.safe_load(text)["automations"]]


def send(block: str) -> None:
    """Let the automations send by a block, named `TYPE/NAME`; make those that are missing.

    Raises:
        PdDeployError: there is no such block, or it is none that sends.
    """
    with served():
        asyncio.run(_send(block))


def show() -> None:
    """Print which automations there are, and by which block they send."""
    with served():
        asyncio.run(_show())


async def _show() -> None:
    async with get_client() as client:
        for automation in automations(NOBODY):
            there = await client.read_automations_by_name(automation.name)
            states = [await _state(client, one) for one in there] or ["not made"]
            typer.echo(f"{automation.name}: {', '.join(states)}")


async def _state(client: PrefectClient, automation: Automation) -> str:
    paused = "" if automation.enabled else ", paused"
    for action in automation.actions:
        if isinstance(action, SendNotification):
            try:
                block = await client.read_block_document(action.block_document_id, False)
            except ObjectNotFound:
                return f"its block was deleted{paused}"
            slug = block.block_type.slug if block.block_type else "?"
            return f"by {slug}/{block.name}{paused}"
    return f"sends nothing{paused}"


async def _send(block: str) -> None:
    slug, _, name = block.partition("/")
    async with get_client() as client:
        try:
            document = await client.read_block_document_by_name(name, slug, include_secrets=False)
        except ObjectNotFound as error:
            raise PdDeployError(
                f"expected a notification block {block}, found none on the Prefect server",
                hint="`prefect block ls` lists those that there are; to make one, `prefect block "
                "register -m prefect.blocks.notifications`, then `prefect block create TYPE` opens "
                "its form: types are slack-webhook, ms-teams-webhook, email-server, custom-webhook "
                "and others",
            ) from error
        schema = document.block_schema
        if not schema or "notify" not in schema.capabilities:
            raise PdDeployError(
                f"expected a block that sends notifications, found {block}, which does not",
                hint="types that do are slack-webhook, ms-teams-webhook, email-server, "
                "custom-webhook and others of `prefect.blocks.notifications`",
            )
        done = []
        for automation in automations(document.id):
            made = await client.read_automations_by_name(automation.name)
            for there in made:
                kept = automation.model_copy(update={"enabled": there.enabled})
                await client.update_automation(there.id, kept)
            if not made:
                await client.create_automation(automation)
            done.append(f"{'changed' if made else 'created'}: {automation.name}")
    # At the end: whoever reads the first line alone, as `head -1` does, gets all of them made.
    typer.echo("\n".join(done))


def stop() -> None:
    """Delete the automations."""
    with served():
        asyncio.run(_stop())


async def _stop() -> None:
    done = []
    async with get_client() as client:
        for automation in automations(NOBODY):
            for there in await client.read_automations_by_name(automation.name):
                await client.delete_automation(there.id)
                done.append(f"deleted: {automation.name}")
    typer.echo("\n".join(done or ["there are none"]))
