"""Serving the app: on loopback to everyone there, beyond it to whoever has the token, never to a page of elsewhere."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING, Any

from rlroute.errors import ConfigError

if TYPE_CHECKING:
    from dash import Dash
    from werkzeug.serving import BaseWSGIServer

COOKIE = "rlroute-token"
SHORTEST = 16
"""Characters of the shortest token."""


def check_address(host: str, token: str | None) -> None:
    """Refuse to be reached from elsewhere without a token.

    Raises:
        ConfigError: naming the host, or the token's length.
    """
    if token is not None and len(token) < SHORTEST:
        raise ConfigError(f"--token of {len(token)} characters: want at least {SHORTEST}")
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host!r} can be reached from other machines: want --token, or a loopback address such as 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether all that a host's name stands for are addresses of this machine alone."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def protect(app: Dash, token: str | None) -> None:
    """Let the app answer only who may ask: with a token whoever has it; without one, whoever calls it by a loopback
    name, which no page of elsewhere can (DNS rebinding). A page that it serves may ask nobody but itself.
    """
    from flask import Response, redirect, request

    server = app.server

    def admit() -> Any:
        if token is None:
            name = request.host.rpartition(":")[0].strip("[]") or request.host
            return None if _is_own(name) else Response("error: call it by a loopback name\n", 403)
        given = request.args.get("token")
        if given is not None and _same(given, token):
            kept = {name: value for name, value in request.args.items() if name != "token"}
            answer = redirect(request.path + _query(kept))
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            return answer
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if _same(request.cookies.get(COOKIE, ""), token) or _same(bearer, token):
            return None
        return Response("error: want the token, as in /?token=...\n", 401)

    def confine(answer: Response) -> Response:
        answer.headers["Content-Security-Policy"] = policy(app)
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer

    server.before_request(admit)
    server.after_request(confine)


def policy(app: Dash) -> str:
    """Return what the page may do: run the app's own scripts, and ask nobody but the server it came from."""
    hashes = " ".join(app.csp_hashes())
    return (
        f"default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


def make_server(app: Dash, host: str, port: int) -> BaseWSGIServer:
    """Return a server that listens; port 0 is any that is free.

    Raises:
        ConfigError: nobody can listen there.
    """
    from werkzeug import serving

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for every request
    try:
        return serving.make_server(host, port, app.server, threaded=True)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} of {host}: nobody can listen there: {error}") from error
    except SystemExit:
        raise ConfigError(f"--port {port} of {host} is taken: want another, or 0 for any that is free") from None


def _is_own(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _query(values: dict[str, str]) -> str:
    from urllib.parse import urlencode

    return f"?{urlencode(values)}" if values else ""
