"""What registries say in headers is understood, and where a repository is asked for is clear."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_deploy.errors import InvalidInput
from pd_deploy.registry.client import Registry
from pd_deploy.registry.headers import Challenge, parse_challenges
from pd_deploy.registry.repository import Repository, repositories_of
from pd_deploy.registry.session import RegistrySession
from pd_deploy.registry.ways import trust
from tests.unit import example

WORD = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=1)
QUOTABLE = st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126))


class TestChallenges:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ([], []),
            (['Basic realm="basic-realm"'], [Challenge("basic", {"realm": "basic-realm"})]),
            (
                [
                    'Bearer realm="https://r.example/auth/",service="dockyard",'
                    'scope="repository:a/b:pull,push"'
                ],
                [
                    Challenge(
                        "bearer",
                        {
                            "realm": "https://r.example/auth/",
                            "service": "dockyard",
                            "scope": "repository:a/b:pull,push",
                        },
                    )
                ],
            ),
            (
                ['Basic realm="a, b=c", BEARER Realm = "x" , service=y'],
                [
                    Challenge("basic", {"realm": "a, b=c"}),
                    Challenge("bearer", {"realm": "x", "service": "y"}),
                ],
            ),
            (
                ["Negotiate", 'Basic realm="q\\"uoted"'],
                [Challenge("negotiate", {}), Challenge("basic", {"realm": 'q"uoted'})],
            ),
            (['realm="without a scheme"'], []),
        ],
    )
    def test_are_taken_apart(self, headers: list[str], expected: list[Challenge]) -> None:
        assert parse_challenges(headers) == expected

    @given(WORD, st.dictionaries(WORD, QUOTABLE, min_size=1))
    def test_say_what_was_said(self, scheme: str, parameters: dict[str, str]) -> None:
        quoted = {
            key: value.replace("\\", "\\\\").replace('"', '\\"')
            for key, value in parameters.items()
        }
        header = f"{scheme} " + ", ".join(f'{key}="{value}"' for key, value in quoted.items())
        assert parse_challenges([header]) == [Challenge(scheme, parameters)]

    @given(st.lists(st.text()))
    def test_of_any_text_are_no_accident(self, headers: list[str]) -> None:
        parse_challenges(headers)


class TestNextPage:
    @pytest.mark.parametrize(
        ("links", "expected"),
        [
            ([], None),
            (['</v2/a/tags/list?last=b&n=2>; rel="next"'], "/v2/a/tags/list?last=b&n=2"),
            (["<https://r.example/v2/?last=b>;rel=next"], "https://r.example/v2/?last=b"),
            (['</1>; rel="prev", </3>; title="a, b"; rel="next"'], "/3"),
            (['</1>; rel="prev"', '</3>; rel="next"'], "/3"),
            (['</1>; rel="nextish"', "</2>; rel=next-one", "</3>"], None),
            (["", "nonsense", ">;=<,"], None),
        ],
    )
    async def test_is_where_the_link_header_says(
        self, links: list[str], expected: str | None
    ) -> None:
        headers = [("Link", link) for link in links]
        answer = httpx.Response(200, headers=headers, stream=httpx.ByteStream(b""))

        @asynccontextmanager
        async def connect(host: str, port: int) -> AsyncIterator[httpx.AsyncClient]:
            async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: answer)) as client:
                yield client

        place = Repository.of("r.example/a")
        session = RegistrySession(place, connect, None, None)
        assert (await session.send("GET", place.url)).next_page == expected
        await session.aclose()


class TestPlace:
    @pytest.mark.parametrize(
        ("name", "url"),
        [
            ("r.example/a/b", "https://r.example/v2/"),
            ("10.0.0.9:5000/a", "https://10.0.0.9:5000/v2/"),
            ("localhost/a", "http://localhost/v2/"),
            ("127.3.0.1:5000/a", "http://127.3.0.1:5000/v2/"),
            ("[::1]:5000/a", "http://[::1]:5000/v2/"),
            ("vllm/vllm-openai", "https://registry-1.docker.io/v2/"),
            ("docker.io/vllm/vllm-openai", "https://registry-1.docker.io/v2/"),
        ],
    )
    def test_is_asked_with_tls_unless_it_is_this_machine(self, name: str, url: str) -> None:
        assert str(Repository.of(name).url) == url
        assert Repository.of(name, ca="/etc/ca.pem").url.scheme == "https"
        of_hub = Repository.of(name).registry == "docker.io"
        assert Repository.of(name, insecure=True).url.scheme == ("https" if of_hub else "http")
        assert Repository.of(name).name == name

    @pytest.mark.parametrize(
        ("name", "path"),
        [
            ("ubuntu", "library/ubuntu"),
            ("docker.io/ubuntu", "library/ubuntu"),
            ("index.docker.io/library/ubuntu", "library/ubuntu"),
            ("vllm/vllm-openai", "vllm/vllm-openai"),
            ("docker.io/a/b/c", "a/b/c"),
        ],
    )
    def test_without_a_registry_is_on_docker_hub(self, name: str, path: str) -> None:
        repository = Repository.of(name)
        assert (repository.registry, repository.path) == ("docker.io", path)

    async def test_on_docker_hub_is_asked_as_dockers_engine_asks(self) -> None:
        """With a token for the repository's full name, from where Docker Hub issues tokens."""
        requests = []

        def answer(request: httpx.Request) -> httpx.Response:
            requests.append(request)
            if request.url.host == "auth.docker.io":
                return httpx.Response(200, stream=httpx.ByteStream(b'{"token": "t"}'))
            if request.headers.get("authorization") != "Bearer t":
                realm = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"'
                return httpx.Response(
                    401, headers={"www-authenticate": realm}, stream=httpx.ByteStream(b"")
                )
            return httpx.Response(200, stream=httpx.ByteStream(b'{"tags": ["v0.23.0-a3"]}'))

        @asynccontextmanager
        async def connect(host: str, port: int) -> AsyncIterator[httpx.AsyncClient]:
            async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
                yield client

        async with Registry(Repository.of("vllm-ascend"), connect) as registry:
            assert await registry.tags() == ["v0.23.0-a3"]
        _, token, listing = requests
        assert dict(token.url.params) == {
            "service": "registry.docker.io",
            "scope": "repository:library/vllm-ascend:pull",
        }
        assert listing.url.host == "registry-1.docker.io"
        assert listing.url.path == "/v2/library/vllm-ascend/tags/list"

    @pytest.mark.parametrize(
        "name", ["A/b", "", "http://r.example/a", "r.example/", "r.example/A", "r.example/a/../b"]
    )
    def test_needs_a_repositorys_name(self, name: str) -> None:
        with pytest.raises(InvalidInput, match="expected a repository, "):
            Repository.of(name)

    @pytest.mark.parametrize("port", ["99999", "0x1", ""])
    def test_needs_a_port_that_is_one(self, port: str) -> None:
        with pytest.raises(InvalidInput, match="expected a repository, "):
            Repository.of(f"r.example:{port}/a")

    def test_of_a_deployment_is_where_its_file_says(self) -> None:
        of = example.service(
            {
                "image": "r.example/a/b:20250722_26",
                "registry": {"host": "10.0.0.9:5000", "insecure": True},
                "update": {"family": "daily", "repository": "c/d"},
            }
        )
        (repository,) = repositories_of(of)
        assert repository == Repository("10.0.0.9:5000/c/d", "10.0.0.9:5000", "c/d", plain=True)


class TestTrust:
    def test_a_ca_comes_on_top_of_the_systems(self) -> None:
        assert trust().verify_mode == ssl.CERT_REQUIRED

    @pytest.mark.parametrize("content", [None, "no certificate", "\0"])
    def test_a_file_without_a_ca_is_an_error_that_names_it(
        self, tmp_path: Path, content: str | None
    ) -> None:
        file = tmp_path / "ca.pem"
        if content is not None:
            file.write_text(content)
        with pytest.raises(InvalidInput, match=r"registry\.ca: expected a file .*ca\.pem"):
            trust(str(file))
        with pytest.raises(InvalidInput, match=r"registry\.ca: expected a file .*other text"):
            trust("-----BEGIN CERTIFICATE-----\nno\n")
