"""Who may ask: hosts, pages, keys; and what the log tells."""

import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from programs import environment
from serving import Served, served


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:99", "[::1]:8080", "LOCALHOST", "app.localhost", "localhost."]
)
def test_this_machines_names_are_answered(demo, host) -> None:
    assert demo.request("/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "192.168.1.9", "", "[x"]
)
def test_a_foreign_host_is_refused(demo, host) -> None:
    for path in ("/v1/models", "/health", "/v1/messages"):
        reply = demo.request(path, headers={"Host": host})
        assert reply.status == 403
        assert "Host" in reply.json["error"]["message"]


def test_a_server_for_others_answers_to_addresses_but_not_to_names(demo_model) -> None:
    with served(demo_model, host="0.0.0.0") as server:
        assert server.request("/v1/models", headers={"Host": "192.168.1.9:80"}).status == 200
        assert server.request("/v1/models", headers={"Host": "evil.example"}).status == 403


def _preflight(server: Served, origin: str):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    return server.request("/v1/chat/completions", method="OPTIONS", headers=headers)


def _allowed(server: Served, origin: str, path: str = "/v1/models") -> str | None:
    reply = server.request(path, headers={"Origin": origin})
    return reply.headers.get("access-control-allow-origin")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:5"])
def test_pages_of_this_machine_may_ask(demo, origin) -> None:
    assert _allowed(demo, origin) == origin
    assert _allowed(demo, origin, "/nowhere") == origin
    preflight = _preflight(demo, origin)
    assert preflight.status == 200
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost.evil.example", "null", "http://localhostx"]
)
def test_other_pages_may_not(demo, origin) -> None:
    assert _allowed(demo, origin) is None
    assert "access-control-allow-origin" not in _preflight(demo, origin).headers


def test_cors_names_the_pages_that_may(demo_model) -> None:
    with served(demo_model, origins=["https://chat.example"], key="secret") as server:
        assert _allowed(server, "https://chat.example") == "https://chat.example"
        assert _allowed(server, "http://localhost:3000") is None
        assert _preflight(server, "https://chat.example").status == 200
    with served(demo_model, origins=["*"]) as server:
        assert _allowed(server, "https://any.example") == "*"


def test_a_key_is_asked_for_in_either_header(demo_model) -> None:
    with served(demo_model, key="secret") as server:
        for path in ("/v1/models", "/v1/chat/completions", "/v1/messages", "/nowhere"):
            assert server.request(path).status == 401
        for headers in (
            {"Authorization": "Bearer secret"},
            {"authorization": "bearer  secret"},
            {"x-api-key": "secret"},
            {"x-api-key": "secret", "Authorization": "Bearer other"},
        ):
            assert server.request("/v1/models", headers=headers).status == 200
        for headers in (
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic secret"},
            {"Authorization": "secret"},
            {"x-api-key": ""},
        ):
            assert server.request("/v1/models", headers=headers).status == 401
        assert server.health()["status"] == "ok"
        refused = server.chat().json["error"]
        assert (refused["type"], refused["code"]) == ("invalid_request_error", "invalid_api_key")
        assert server.message().json["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_where_that_is_asked_for(demo_model, caplog, log_prompts) -> None:
    secret = "swordfish"

    def fail() -> None:
        raise KeyError(secret)

    with (
        caplog.at_level(logging.DEBUG),
        served(demo_model, log_prompts=log_prompts) as server,
    ):
        server.says("swordfish too")
        server.chat("swordfish")
        server.message("swordfish", stream=True)
        server.chat("swordfish", temperature="swordfish")
        server.chat("swordfish", messages="swordfish")
        server.before_token = fail
        assert server.chat().status == 500
    assert ("swordfish" in caplog.text) is log_prompts
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "POST /v1/chat/completions 400" in caplog.text
    assert "KeyError" in caplog.text


def test_the_program_says_where_it_is_and_ends_at_once_with_ctrl_c() -> None:
    program = [sys.executable, "-m", "flashmoe", "serve", "demo", "--port", "0", "--context", "999"]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(
                r"(http://127\.0\.0\.1:\d+) serves demo, context: 999 tokens\n", line
            )
            body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true, "n": 100}'
            request = urllib.request.Request(f"{match[1]}/v1/chat/completions", body)
            with urllib.request.urlopen(request, timeout=30) as response:
                response.readline()
                os.kill(process.pid, signal.SIGINT)
                out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "POST /v1/chat/completions 200" in err


def test_an_address_that_is_taken_is_said_before_the_model_is_loaded(demo) -> None:
    program = [sys.executable, "-m", "flashmoe", "serve", "demo", "--port", str(demo.port)]
    done = subprocess.run(
        program, check=False, capture_output=True, text=True, env=environment(), timeout=30
    )
    assert done.returncode == 2
    assert f"cannot listen at 127.0.0.1, port {demo.port}" in done.stderr
    assert "experts per token" not in done.stderr


def test_serving_takes_a_backend() -> None:
    command = [sys.executable, "-m", "flashmoe", "serve", "demo", "--port", "0"]
    run = subprocess.run(
        [*command, "--backend", "abacus"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "backend must be one of" in run.stderr
