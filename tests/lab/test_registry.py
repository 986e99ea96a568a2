"""Tags and digests from real registries: every login, TLS, pages, faults, and through a host."""

import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from pd_deploy.cli.local_http import free_port
from pd_deploy.config.models import UpdatePolicy
from pd_deploy.errors import (
    AuthenticationFailed,
    ImageNotFound,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnavailable,
)
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.host import Host
from pd_deploy.hosts.login import Login
from pd_deploy.lab import Lab, LabHost, images
from pd_deploy.lab.lifecycle import prepare
from pd_deploy.lab.system import wait_until
from pd_deploy.registry import client, session
from pd_deploy.registry.client import Build, Registry, reach, search
from pd_deploy.registry.repository import Repository
from pd_deploy.registry.ways import straight, trust
from tests.lab.registries import (
    LOGIN,
    Authority,
    Registries,
    Reply,
    Request,
    Tokens,
    basic,
    configuration,
    htpasswd,
    in_front_of,
    in_pages,
    push,
    push_index,
    serving,
    token_auth,
)

WRONG = RegistryLogin(LOGIN.username, "open-barley")
DAILY = UpdatePolicy(family="daily")
HOST_PORT = 5010


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registries")


@pytest.fixture(scope="module")
def registries(directory: Path) -> Iterator[Registries]:
    made = Registries(prepare().root / "usr/bin/docker-registry", directory)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def authority(directory: Path) -> Authority:
    return Authority(directory)


@pytest.fixture(scope="module")
def anyone(registries: Registries) -> str:
    """A registry that lets everybody in, also to push."""
    return registries.start()


@pytest.fixture(scope="module")
def with_password(registries: Registries, directory: Path) -> str:
    return registries.start(auth=htpasswd(directory / "htpasswd"))


@pytest.fixture(scope="module")
def with_tls(registries: Registries, authority: Authority) -> str:
    return registries.start(tls=authority.server("127.0.0.1"))


@pytest.fixture
def repository() -> str:
    """A repository of the test's own."""
    return f"omni-ci/daily-{uuid4().hex[:8]}"


@pytest.fixture
async def ask() -> AsyncIterator[Callable[..., Registry]]:
    """Asks registries from this machine."""
    opened: list[Registry] = []

    def make(
        address: str, repository: str, login: RegistryLogin | None = None, **more: Any
    ) -> Registry:
        place = Repository.of(f"{address}/{repository}", **more)
        opened.append(Registry(place, straight(trust(place.ca)), login))
        return opened[-1]

    yield make
    for one in opened:
        await one.__aexit__(None, None, None)


Ask = Callable[..., Registry]


class TestTagsAndDigests:
    async def test_a_tag_stands_for_the_digest_it_was_pushed_with(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        digest = push(anyone, repository, "20250722_26")
        asked = ask(anyone, repository)
        await asked.ping()
        assert await asked.tags() == ["20250722_26"]
        assert await asked.digest("20250722_26") == digest

    async def test_a_tag_that_is_pushed_again_stands_for_another_digest(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        asked = ask(anyone, repository)
        first = push(anyone, repository, "20250722_26", "first")
        assert await asked.digest("20250722_26") == first
        second = push(anyone, repository, "20250722_26", "second")
        assert await asked.digest("20250722_26") == second != first

    async def test_an_image_for_several_architectures_has_the_digest_of_its_index(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        push(anyone, repository, "arm64")
        index = push_index(anyone, repository, "20250722_26", "arm64")
        assert await ask(anyone, repository).digest("20250722_26") == index

    async def test_a_digest_that_no_header_gives_is_that_of_the_manifest(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        digest = push(anyone, repository, "1")

        def without_digest(request: Request) -> Reply:
            reply = in_front_of(anyone, request)
            return Reply(reply.status, {}, reply.body)

        with serving(without_digest) as front:
            assert await ask(front.address, repository).digest("1") == digest
            assert [request.method for request in front.requests] == ["HEAD", "GET"]

    async def test_an_absent_tag_or_repository_is_named(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        asked = ask(anyone, repository)
        with pytest.raises(ImageNotFound, match=f"repository {anyone}/{repository} is not in"):
            await asked.tags()
        push(anyone, repository, "1")
        with pytest.raises(ImageNotFound, match=f"{anyone}/{repository}:2 is not in the registry"):
            await asked.digest("2")


class TestPages:
    TAGS = tuple(f"20250722_{number}" for number in range(7))

    @pytest.mark.parametrize("link", ["{path}", "http://127.0.0.1{path}", "list{path}"])
    async def test_are_all_read_whether_links_are_relative_or_absolute(
        self, anyone: str, repository: str, ask: Ask, link: str
    ) -> None:
        for tag in self.TAGS:
            push(anyone, repository, tag)
        if link == "list{path}":  # relative to the page itself

            def answer(request: Request) -> Reply:
                reply = in_pages(anyone, 3, "{path}")(request)
                links = reply.headers.get("Link", "").replace(f"/v2/{repository}/tags/", "")
                return Reply(reply.status, {"Link": links} if links else {}, reply.body)
        else:
            answer = in_pages(anyone, 3, link)
        with serving(answer) as front:
            assert sorted(await ask(front.address, repository).tags()) == sorted(self.TAGS)
            assert len(front.requests) == 3

    async def test_with_a_hundred_tags_and_more_end(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        tags = {f"20250722_{number}" for number in range(120)}
        push(anyone, repository, "20250722_0")
        pushed = images.Repository(anyone, repository)
        for tag in tags:
            pushed.push_manifest(tag, pushed.manifest("20250722_0"))
        assert set(await ask(anyone, repository).tags()) == tags
        with serving(in_pages(anyone, 50, "{path}")) as front:
            assert set(await ask(front.address, repository).tags()) == tags

    @pytest.mark.parametrize(
        ("link", "says"),
        [
            (
                "http://elsewhere.example/v2/",
                "next page of tags on .*, found it on elsewhere.example",
            ),
            ("//elsewhere.example/v2/", "next page of tags on .*, found it on elsewhere.example"),
            (
                "/v2/a/tags/list?n=1000",
                "expected the list of tags to end, found still more after page 1",
            ),
        ],
    )
    async def test_that_lead_elsewhere_or_nowhere_are_refused(
        self, ask: Ask, link: str, says: str
    ) -> None:
        reply = Reply(200, {"Link": f'<{link}>; rel="next"'}, b'{"tags": ["1"]}')
        with serving(lambda _: reply) as server:
            with pytest.raises(RegistryMisconfigured, match=says):
                await ask(server.address, "a").tags()
            assert len(server.requests) == 1

    async def test_that_a_registry_bounds_are_read_in_its_size(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        for tag in self.TAGS:
            push(anyone, repository, tag)

        def answer(request: Request) -> Reply:
            allowed = int(request.query["n"][0]) <= 100
            return in_pages(anyone, 100, "{path}")(request) if allowed else Reply(400)

        with serving(answer) as front:
            assert sorted(await ask(front.address, repository).tags()) == sorted(self.TAGS)
            assert [request.query["n"] for request in front.requests] == [["1000"], ["100"]]

    async def test_without_end_are_given_up(
        self, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "MAX_PAGES", 5)

        def ever_on(request: Request) -> Reply:
            number = len(server.requests)
            return Reply(200, {"Link": f'<?last={number}>; rel="next"'}, b'{"tags": null}')

        with (
            serving(ever_on) as server,
            pytest.raises(RegistryMisconfigured, match="found still more after page 5"),
        ):
            await ask(server.address, "a").tags()


class TestPassword:
    async def test_the_right_one_opens(
        self, anyone: str, with_password: str, repository: str, ask: Ask
    ) -> None:
        digest = push(anyone, repository, "1")
        asked = ask(with_password, repository, LOGIN)
        await asked.ping()
        assert await asked.tags() == ["1"]
        assert await asked.digest("1") == digest

    async def test_a_wrong_one_is_denied_and_not_shown(
        self, with_password: str, repository: str, ask: Ask
    ) -> None:
        with pytest.raises(RegistryDenied, match=r"answers 401.*check the reg") as caught:
            await ask(with_password, repository, WRONG).tags()
        assert_secret(caught.value, WRONG)

    async def test_none_is_denied_with_what_to_write(
        self, with_password: str, repository: str, ask: Ask
    ) -> None:
        with pytest.raises(RegistryDenied, match=r"set `registry: {credentials: …}`"):
            await ask(with_password, repository).digest("1")

    async def test_the_right_one_does_not_help_against_an_absent_tag(
        self, anyone: str, with_password: str, repository: str, ask: Ask
    ) -> None:
        push(anyone, repository, "1")
        with pytest.raises(ImageNotFound):
            await ask(with_password, repository, LOGIN).digest("2")


class TestTokens:
    @pytest.fixture(params=["token", "access_token"])
    def key(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @staticmethod
    def start(registries: Registries, authority: Authority, realm: str) -> str:
        return registries.start(auth=token_auth(f"http://{realm}/auth", authority))

    async def test_are_asked_for_once_and_credentials_go_to_their_server_alone(
        self,
        registries: Registries,
        authority: Authority,
        anyone: str,
        repository: str,
        ask: Ask,
        key: str,
    ) -> None:
        digest = push(anyone, repository, "1")
        tokens = Tokens(authority, lambda token: {key: token, "expires_in": 300})
        with serving(tokens) as realm:
            behind = self.start(registries, authority, realm.address)
            with serving(lambda request: in_front_of(behind, request)) as front:
                asked = ask(front.address, repository, LOGIN)
                await asked.ping()
                assert await asked.tags() == ["1"]
                assert await asked.digest("1") == digest
            assert [request.headers["authorization"] for request in realm.requests] == [
                basic(LOGIN)
            ]
            assert realm.requests[0].query["scope"] == [f"repository:{repository}:pull"]
            given = [request.headers.get("authorization", "") for request in front.requests]
            assert [scheme.partition(" ")[0] for scheme in given] == ["", "", "Bearer", "Bearer"]

    async def test_are_given_to_anybody_for_what_is_public(
        self, registries: Registries, authority: Authority, anyone: str, ask: Ask
    ) -> None:
        digest = push(anyone, "public/image", "1")
        with serving(Tokens(authority, lambda token: {"token": token})) as realm:
            address = self.start(registries, authority, realm.address)
            assert await ask(address, "public/image").digest("1") == digest

    async def test_that_have_expired_are_asked_for_anew(
        self, registries: Registries, authority: Authority, anyone: str, repository: str, ask: Ask
    ) -> None:
        push(anyone, repository, "1")
        tokens = Tokens(authority, lambda token: {"token": token, "expires_in": 0})
        with serving(tokens) as realm:
            asked = ask(self.start(registries, authority, realm.address), repository, LOGIN)
            assert await asked.digest("1") == await asked.digest("1")
            assert len(realm.requests) == 2

    async def test_that_the_registry_takes_back_are_asked_for_anew(
        self, registries: Registries, authority: Authority, anyone: str, repository: str, ask: Ask
    ) -> None:
        push(anyone, repository, "1")
        with serving(Tokens(authority, lambda token: {"token": token})) as realm:
            behind = self.start(registries, authority, realm.address)

            def forgetful(request: Request) -> Reply:
                given = request.headers.get("authorization")
                used = [one.headers.get("authorization") for one in front.requests]
                if given and used.count(given) > 1:
                    request = Request(request.method, request.path, {})
                return in_front_of(behind, request)

            with serving(forgetful) as front:
                asked = ask(front.address, repository, LOGIN)
                assert await asked.digest("1") == await asked.digest("1")
            assert len(realm.requests) == 2

    @pytest.mark.parametrize("login", [None, WRONG])
    async def test_are_not_given_without_the_right_credentials(
        self,
        registries: Registries,
        authority: Authority,
        anyone: str,
        repository: str,
        ask: Ask,
        login: RegistryLogin | None,
    ) -> None:
        push(anyone, repository, "1")
        with serving(Tokens(authority, lambda token: {"token": token})) as realm:
            asked = ask(self.start(registries, authority, realm.address), repository, login)
            with pytest.raises(RegistryDenied) as caught:
                await asked.tags()
        assert_secret(caught.value, WRONG)

    @pytest.mark.parametrize(
        "realm",
        [
            "ftp://127.0.0.1/",
            "/auth",
            "",
            "http://robot:x@127.0.0.1/",
            "http://127.0.0.1:x/",
            "http://r:99999/",
        ],
    )
    async def test_are_not_asked_for_where_nobody_should(self, ask: Ask, realm: str) -> None:
        wanted = Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'})
        with (
            serving(lambda _: wanted) as server,
            pytest.raises(RegistryMisconfigured, match="expected it to name http or https://… for"),
        ):
            await ask(server.address, "a", LOGIN).tags()

    async def test_are_not_asked_for_in_clear_text_for_a_registry_with_tls(
        self, registries: Registries, authority: Authority, ask: Ask
    ) -> None:
        with serving(Tokens(authority, lambda token: {"token": token})) as realm:
            address = registries.start(
                auth=token_auth(f"http://{realm.address}/auth", authority),
                tls=authority.server("127.0.0.1"),
            )
            asked = ask(address, "a", LOGIN, ca=str(authority.file))
            with pytest.raises(
                RegistryMisconfigured, match="expected it to name https://… for tokens"
            ):
                await asked.tags()
            assert realm.requests == []

    @pytest.mark.parametrize(
        ("answer", "error", "says"),
        [
            (Reply(200, {}, b"{}"), RegistryMisconfigured, "a token from 127.0.0.1, found none"),
            (Reply.json({"token": "a\nb"}), RegistryMisconfigured, "found none"),
            (Reply(200, {}, b"<html>"), RegistryMisconfigured, "as JSON, found something else"),
            (Reply(404), RegistryMisconfigured, "which answers 404"),
            (Reply(503), RegistryUnavailable, "a token from 127.0.0.1: .* answers 503"),
            (Reply(302, {"Location": "http://x.example/?secret"}), RegistryMisconfigured, "redir"),
        ],
    )
    async def test_that_are_none_say_so(
        self, ask: Ask, answer: Reply, error: type[Exception], says: str
    ) -> None:
        with serving(lambda _: answer) as realm:
            wanted = Reply(401, {"WWW-Authenticate": f'Bearer realm="http://{realm.address}/"'})
            with serving(lambda _: wanted) as server, pytest.raises(error, match=says) as caught:
                await ask(server.address, "a", LOGIN).tags()
        assert_secret(caught.value, LOGIN)
        assert "secret" not in str(caught.value)


class TestTls:
    async def test_with_a_ca_of_its_own_is_trusted_by_file_or_text(
        self, anyone: str, with_tls: str, authority: Authority, repository: str, ask: Ask
    ) -> None:
        digest = push(anyone, repository, "1")
        for ca in (str(authority.file), authority.pem):
            assert await ask(with_tls, repository, ca=ca).digest("1") == digest

    async def test_that_nobody_vouches_for_is_not_trusted(
        self, with_tls: str, repository: str
    ) -> None:
        place = Repository(f"{with_tls}/{repository}", with_tls, repository)
        async with Registry(place, straight(trust())) as asked:
            with pytest.raises(RegistryMisconfigured, match=r"not trusted.*`registry: {ca: …}`"):
                await asked.ping()

    async def test_for_another_name_is_not_trusted(
        self, with_tls: str, authority: Authority, repository: str, ask: Ask
    ) -> None:
        address = with_tls.replace("127.0.0.1", "localhost")
        with pytest.raises(RegistryMisconfigured, match="localhost is not trusted"):
            await ask(address, repository, ca=authority.pem).ping()

    async def test_is_not_found_where_plain_http_is_spoken(
        self, anyone: str, authority: Authority, repository: str, ask: Ask
    ) -> None:
        with pytest.raises(
            RegistryMisconfigured, match=r"the TLS handshake with .* failed.*insecure: true"
        ):
            await ask(anyone, repository, ca=authority.pem).ping()

    async def test_is_missed_where_it_is_spoken(
        self, with_tls: str, repository: str, ask: Ask
    ) -> None:
        with pytest.raises(
            RegistryMisconfigured, match="expected a registry's answer, found another"
        ):
            await ask(with_tls, repository).ping()


class TestFaults:
    async def test_a_registry_that_is_down_may_be_back_later(self, ask: Ask) -> None:
        address = f"127.0.0.1:{free_port()}"
        with pytest.raises(RegistryUnavailable, match=f"{address} does not answer"):
            await ask(address, "a").ping()

    async def test_a_name_that_nobody_knows_may_be_known_later(self, ask: Ask) -> None:
        for host in ("no-such-host.invalid", "x" * 70 + ".invalid"):
            with pytest.raises(RegistryUnavailable, match=f"{host} does not answer"):
                await ask(host, "a").ping()

    @pytest.mark.parametrize("status", [429, 500, 502, 503])
    async def test_an_overloaded_registry_may_have_time_later(self, ask: Ask, status: int) -> None:
        with serving(lambda _: Reply(status)) as server:
            asked = ask(server.address, "a")
            for call in (asked.ping(), asked.tags(), asked.digest("1")):
                with pytest.raises(RegistryUnavailable, match=f"answers {status}"):
                    await call

    @pytest.mark.parametrize("tls", [True, False])
    async def test_a_registry_that_is_slow_is_given_up(
        self, ask: Ask, authority: Authority, monkeypatch: pytest.MonkeyPatch, tls: bool
    ) -> None:
        monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 0.1)
        monkeypatch.setattr(session, "READ_TIMEOUT_S", 0.1)
        ca = authority.pem if tls else None
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(RegistryUnavailable, match="no answer in time"):
                await ask(f"127.0.0.1:{port}", "a", ca=ca).ping()

    @pytest.mark.parametrize(
        ("reply", "says"),
        [
            (Reply(404), "found a server without /v2/"),
            (Reply(418), "expected a registry's answer, found another: .* answers 418"),
            (Reply(401), "expected a Bearer or Basic login, found none"),
            (Reply(401, {"WWW-Authenticate": "Negotiate"}), "found negotiate"),
            (Reply(302, {"Location": "https://x.example/login?next=1"}), "x.example/login →"),
        ],
    )
    async def test_what_is_no_registry_is_told_from_one(
        self, ask: Ask, reply: Reply, says: str
    ) -> None:
        with serving(lambda _: reply) as server, pytest.raises(RegistryMisconfigured, match=says):
            await ask(server.address, "a").ping()

    @pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"tags": "1"}', b"[" * 100_000])
    async def test_a_list_of_tags_that_is_none_is_told(self, ask: Ask, body: bytes) -> None:
        with (
            serving(lambda _: Reply(200, {}, body)) as server,
            pytest.raises(RegistryMisconfigured, match="list of tags"),
        ):
            await ask(server.address, "a").tags()

    async def test_a_web_page_in_the_registrys_place_is_told(self, ask: Ask) -> None:
        page = Reply(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Sign in</html>")
        with serving(lambda _: page) as server:
            asked = ask(server.address, "a")
            for call in (asked.ping(), asked.tags(), asked.digest("1")):
                with pytest.raises(RegistryMisconfigured, match="answers with a web page"):
                    await call

    async def test_what_is_no_manifest_has_no_digest(self, ask: Ask) -> None:
        with (
            serving(lambda _: Reply(200, {}, b"<html>Sign in</html>")) as server,
            pytest.raises(RegistryMisconfigured, match="expected the manifest of"),
        ):
            await ask(server.address, "a").digest("1")

    async def test_an_answer_without_end_is_cut(
        self, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "MAX_BODY", 1 << 20)
        with (
            serving(lambda _: Reply(200, {}, b" " * (2 << 20))) as server,
            pytest.raises(RegistryMisconfigured, match="at most 1 MiB, found more"),
        ):
            await ask(server.address, "a").tags()

    async def test_forbidden_is_denied(self, ask: Ask) -> None:
        with serving(lambda _: Reply(403)) as server, pytest.raises(RegistryDenied):
            await ask(server.address, "a", LOGIN).tags()

    async def test_credentials_follow_no_redirect(self, ask: Ask) -> None:
        with serving(lambda _: Reply.json({"tags": []})) as other:

            def redirect(request: Request) -> Reply:
                if "authorization" not in request.headers:
                    return Reply(401, {"WWW-Authenticate": 'Basic realm="r"'})
                return Reply(307, {"Location": f"http://{other.address}/v2/"})

            with (
                serving(redirect) as server,
                pytest.raises(RegistryMisconfigured, match=f"a redirect to http://{other.address}"),
            ):
                await ask(server.address, "a", LOGIN).tags()
            assert other.requests == []


class TestNewest:
    async def test_is_the_newest_build_of_its_family(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        pushed = {
            tag: push(anyone, repository, tag)
            for tag in ("20250722_9", "20250722_26", "latest", "20250723_rc", "202601010000")
        }
        found = await search([ask(anyone, repository)], DAILY)
        name = f"{anyone}/{repository}"
        assert found.newest == Build(name, "20250722_26", pushed["20250722_26"])
        assert {name: set(listed) for name, listed in found.tags.items()} == {name: set(pushed)}
        assert found.newer_of_other_forms == ("202601010000", "20250723_rc")

    async def test_of_several_repositories_is_the_newest_of_all(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        renamed = f"{repository}-renamed"
        push(anyone, repository, "20250722_1")
        push(anyone, repository, "20250724_1", "first")
        push(anyone, renamed, "20250723_1")
        both = [ask(anyone, repository), ask(anyone, renamed)]
        assert (await search(both, DAILY)).expect_build().image == (
            f"{anyone}/{repository}:20250724_1"
        )
        bad = push(anyone, renamed, "20250724_1", "second")
        found = await search(both[::-1], DAILY, skip={bad})
        assert found.expect_build().image == f"{anyone}/{repository}:20250724_1"
        assert found.quarantined == (Build(f"{anyone}/{renamed}", "20250724_1", bad),)

    async def test_leaves_out_what_is_in_quarantine_under_whichever_tag(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        good = push(anyone, repository, "20250722_1", "good")
        bad = push(anyone, repository, "20250722_2", "bad")
        push(anyone, repository, "20250722_3", "bad")
        asked = ask(anyone, repository)
        found = await search([asked], DAILY, skip={bad})
        assert found.newest == Build(asked.repository.name, "20250722_1", good)
        repaired = push(anyone, repository, "20250722_3", "repaired")
        found = await search([asked], DAILY, skip={bad})
        assert found.newest == Build(asked.repository.name, "20250722_3", repaired)

    async def test_that_is_none_says_what_was_seen(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        bad = push(anyone, repository, "20250722_1")
        push(anyone, repository, "latest")
        says = f"family daily in {anyone}/{repository}, found none to use: 2 tags, 1 of the family"
        with pytest.raises(ImageNotFound, match=rf"{re.escape(says)}, 1 in quarantine"):
            (await search([ask(anyone, repository)], DAILY, skip=[bad])).expect_build()

    async def test_passes_over_a_tag_that_is_listed_after_its_end(
        self, anyone: str, repository: str, ask: Ask
    ) -> None:
        digest = push(anyone, repository, "20250722_1")

        def with_ghost(request: Request) -> Reply:
            reply = in_front_of(anyone, request)
            if "/tags/list" not in request.path:
                return reply
            return Reply.json({"tags": [*json.loads(reply.body)["tags"], "20250722_2"]})

        with serving(with_ghost) as front:
            found = await search([ask(front.address, repository)], DAILY)
        assert found.newest == Build(f"{front.address}/{repository}", "20250722_1", digest)


class TestThroughAHost:
    @pytest.fixture
    async def host(self, lab: Lab) -> AsyncIterator[Host]:
        login = Login(
            "root", private_key=lab.ssh_key.read_text(), known_hosts=lab.known_hosts.read_text()
        )
        host = Host("a", lab.hosts["a"].address, login)
        yield host
        await host.aclose()

    @pytest.fixture
    def box(self, lab: Lab) -> LabHost:
        return lab.hosts["a"]

    @pytest.fixture
    def start(self, box: LabHost) -> Iterator[Callable[..., None]]:
        """Starts a registry on the host that has one image, at 127.0.0.1 and its name."""
        processes = []

        def start(**more: Any) -> None:
            config = box.box.path("/tmp/registry.yml")
            config.write_text(configuration(f":{HOST_PORT}", "/tmp/registry", **more))
            processes.append(box.popen(["docker-registry", "serve", "/tmp/registry.yml"]))
            wait_until("the host's registry", lambda: reachable(box), 20)

        yield start
        for process in processes:
            process.kill()
            process.wait()
        wait_until("the host's registry to end", lambda: not reachable(box), 20)

    async def test_a_registry_in_reach_of_this_machine_is_asked_straight(
        self, lab: Lab, host: Host
    ) -> None:
        name, digest = lab.image.rpartition(":")[0], lab.images[lab.image]
        async with reach(Repository.of(name, insecure=True), via=host) as asked:
            assert await asked.digest(lab.image.rpartition(":")[2]) == digest
        assert host.connects == 0

    async def test_a_registry_that_only_the_host_knows_is_asked_through_it(
        self, host: Host, box: LabHost, start: Callable[..., None]
    ) -> None:
        start()
        digest = push(f"{box.address}:{HOST_PORT}", "a", "20250722_1")
        place = Repository.of(f"{box.box.name}:{HOST_PORT}/a", insecure=True)
        async with reach(place, via=host) as asked:
            found = await search([asked], DAILY)
        assert found.newest == Build(place.name, "20250722_1", digest)
        assert host.connects == 1

    async def test_a_loopback_address_is_the_hosts_own(
        self, host: Host, box: LabHost, start: Callable[..., None], anyone: str
    ) -> None:
        start()
        digest = push(f"{box.address}:{HOST_PORT}", "b", "1")
        async with reach(Repository.of(f"127.0.0.1:{HOST_PORT}/b"), via=host) as asked:
            assert await asked.digest("1") == digest
        absent = Repository.of(f"{anyone}/b")
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            async with reach(absent, via=host):
                pass

    async def test_tls_is_checked_through_it(
        self, host: Host, box: LabHost, start: Callable[..., None], authority: Authority
    ) -> None:
        start(tls=copied(box, authority.server(box.box.name)))
        name = f"{box.box.name}:{HOST_PORT}/none"
        async with reach(Repository.of(name, ca=authority.pem), via=host) as asked:
            with pytest.raises(ImageNotFound):
                await asked.tags()
        with pytest.raises(RegistryMisconfigured, match=f"{box.box.name} is not trusted"):
            async with reach(Repository.of(name), via=host):
                pass

    async def test_a_registry_that_is_down_is_told_with_both_ways(
        self, host: Host, box: LabHost
    ) -> None:
        place = Repository.of(f"{box.box.name}:{HOST_PORT}/a", insecure=True)
        with pytest.raises(RegistryUnavailable) as caught:
            async with reach(place, via=host):
                pass
        assert str(caught.value).startswith(f"host a ({box.address}): {place.registry} does not")
        assert f"directly from this machine: {place.registry} does not answer" in str(caught.value)

    async def test_it_is_asked_where_this_machines_http_proxy_lets_nobody_through(
        self, lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, digest = lab.image.rpartition(":")[0], lab.images[lab.image]
        with serving(lambda _: Reply(403)) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            async with reach(Repository.of(name, insecure=True), via=host) as asked:
                assert await asked.digest(lab.image.rpartition(":")[2]) == digest
            assert [urlsplit(request.path).netloc for request in proxy.requests] == [lab.registry]
        assert host.connects == 1

    async def test_what_is_wrong_straight_from_here_is_told_if_the_host_knows_no_more(
        self, lab: Lab, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = Repository.of(f"{lab.machine_address}:{HOST_PORT}/a", insecure=True)
        with serving(lambda _: Reply(404)) as proxy:
            monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
            with pytest.raises(RegistryMisconfigured, match="a server without /v2/"):
                async with reach(place, via=host):
                    pass

    async def test_a_host_that_lets_nobody_in_is_not_taken_for_a_registry_that_is_down(
        self, lab: Lab, box: LabHost
    ) -> None:
        login = Login("root", password="wrong", known_hosts=lab.known_hosts.read_text())
        host = Host("a", box.address, login)
        place = Repository.of(f"{box.box.name}:{HOST_PORT}/a", insecure=True)
        with pytest.raises(AuthenticationFailed):
            async with reach(place, via=host):
                pass
        await host.aclose()

    async def test_an_error_while_asking_is_not_a_reason_to_ask_again(
        self, lab: Lab, host: Host
    ) -> None:
        name = lab.image.rpartition(":")[0]
        with pytest.raises(RegistryUnavailable, match="by the test"):
            async with reach(Repository.of(name, insecure=True), via=host):
                raise RegistryUnavailable("by the test")
        assert host.connects == 0


def copied(box: LabHost, files: Mapping[str, str]) -> dict[str, str]:
    """Where copies of the machine's files are on the host."""
    for file in files.values():
        box.box.path(f"/tmp/{Path(file).name}").write_bytes(Path(file).read_bytes())
    return {key: f"/tmp/{Path(file).name}" for key, file in files.items()}


def reachable(box: LabHost) -> bool:
    """Whether the host's registry listens."""
    with socket.socket() as probe:
        return probe.connect_ex((box.address, HOST_PORT)) == 0


def assert_secret(error: Exception, login: RegistryLogin) -> None:
    """Neither password nor its coded form is in an error."""
    for text in (str(error), repr(error), repr(vars(error))):
        assert login.password not in text
        assert basic(login).partition(" ")[2] not in text
