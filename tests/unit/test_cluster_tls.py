"""TLS and mTLS of both servers, in front of fake clusters, by the clients that users have."""

import asyncio
import os
import signal
import ssl
from pathlib import Path

import httpx
import pytest

from cluster import Client, ClientTls, ClusterError, SamplingParams, ServerUnavailable
from cluster.http.app import build_app
from cluster.http.settings import Settings
from cluster.serve import _bind
from cluster.serving import until_stopped
from cluster.tls import ServerTls
from configs import ConfigError, ServerConfig
from tests import fake_backend, rpc_backend
from tests.certificates import Files, write_certificates


def serving(files: Files, *, mutual: bool) -> ServerConfig:
    return ServerConfig(
        ssl_certfile=str(files.cert),
        ssl_keyfile=str(files.key),
        ssl_ca_certs=str(files.ca) if mutual else None,
    )


def trusting(files: Files, *, mutual: bool) -> ClientTls:
    if not mutual:
        return ClientTls(ca_certs=files.ca)
    return ClientTls(ca_certs=files.ca, certfile=files.cert, keyfile=files.key)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_certificates(tmp_path_factory.mktemp("tls") / "theirs")


@pytest.mark.parametrize("mutual", [False, True])
def test_grpc(ours: Files, theirs: Files, mutual: bool) -> None:
    """Only over TLS, only to a server that is trusted and, with mTLS, only with a certificate."""
    params = SamplingParams(max_tokens=3, temperature=0.0)
    tls = ServerTls.of(serving(ours, mutual=mutual))
    with rpc_backend.serve(rpc_backend.FakeBackend(), tls=tls) as (target, _, _):
        with Client(target, tls=trusting(ours, mutual=mutual)) as client:
            assert client.generate("abc", params)[0].outputs[0].token_ids
            assert asyncio.run(client.agenerate("abc", params)).outputs[0].token_ids
        refused = [None, trusting(theirs, mutual=mutual)]
        if mutual:
            refused.append(trusting(ours, mutual=False))
        for wrong in refused:
            with Client(target, tls=wrong) as client, pytest.raises(ServerUnavailable):
                client.status()


@pytest.mark.parametrize("mutual", [False, True])
def test_http(ours: Files, theirs: Files, mutual: bool) -> None:
    """The same of HTTP."""

    def context_of(files: Files, *, with_certificate: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=files.ca)
        if with_certificate:
            context.load_cert_chain(files.cert, files.key)
        return context

    async def test() -> None:
        app = build_app(fake_backend.FakeBackend(), Settings(names=("m",)))
        tls = ServerTls.of(serving(ours, mutual=mutual))
        with _bind("127.0.0.1", 0, "--port") as listener:
            at = f"127.0.0.1:{listener.getsockname()[1]}/health"
            served = asyncio.create_task(until_stopped(app, listener, "up", 0.0, tls=tls))
            good = context_of(ours, with_certificate=mutual)
            async with httpx.AsyncClient(verify=good, timeout=60) as client:
                for _ in range(600):
                    try:
                        response = await client.get(f"https://{at}")
                        break
                    except httpx.ConnectError:  # not up yet
                        await asyncio.sleep(0.1)
                assert response.status_code == 200
                with pytest.raises(httpx.HTTPError):
                    await client.get(f"http://{at}")
            wrong = [context_of(theirs, with_certificate=True)]
            wrong += [context_of(ours, with_certificate=False)] * mutual
            for context in wrong:
                async with httpx.AsyncClient(verify=context, timeout=60) as client:
                    with pytest.raises(httpx.HTTPError):
                        await client.get(f"https://{at}")
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(60):
                await served

    asyncio.run(test())


def test_files_that_cannot_be_used_are_one_sentence(
    ours: Files, theirs: Files, tmp_path: Path
) -> None:
    """Said when the server starts, not when the first client comes."""
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    none = str(tmp_path / "none.pem")

    def refusal(certfile: object, keyfile: object, ca_certs: object = None) -> str:
        ca = None if ca_certs is None else str(ca_certs)
        config = ServerConfig(ssl_certfile=str(certfile), ssl_keyfile=str(keyfile), ssl_ca_certs=ca)
        with pytest.raises(ConfigError) as caught:
            ServerTls.of(config)
        return str(caught.value)

    assert refusal(none, ours.key) == f"cannot read {none}: No such file or directory"
    assert "no certificate and its key in PEM" in refusal(text, ours.key)
    assert "key values mismatch" in refusal(ours.cert, theirs.key)
    assert "holds no certificates in PEM" in refusal(ours.cert, ours.key, text)
    assert ServerTls.of(ServerConfig()) is None
    with pytest.raises(ClusterError, match="cannot read"):
        Client("127.0.0.1:1", tls=ClientTls(ca_certs=none))
    with pytest.raises(ClusterError, match="give both"):
        Client("127.0.0.1:1", tls=ClientTls(certfile=ours.cert))
