"""Who may ask: bearer tokens, compared in constant time, and the hosts a browser may name."""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.server.error import ApiError

BUDGET_TOKEN, API_KEY = "EDGEKIT_BUDGET_TOKEN", "EDGEKIT_API_KEY"  # environment variables
LEAST_SECRET = 8  # characters
MAX_SECRET = 1 << 12
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """What a request must show.

    Attributes:
        host: The address that is listened on.
        budget_token: For ``/budget``.
        api_key: For ``/v1``; ``None`` asks for none.
    """

    host: str
    budget_token: str
    api_key: str | None = None

    def check_host(self, header: str) -> None:
        """Check the ``Host`` header: a web page whose name leads to loopback may not ask.

        Raises:
            ApiError: It names another host.
        """
        if not is_loopback(self.host):
            return
        if _name_in(header) not in (*LOOPBACK_NAMES, self.host):
            raise ApiError(421, f"this server is not {header[:80]!a}; ask for localhost")

    def check_budget(self, header: str) -> None:
        """Check the ``Authorization`` header of ``/budget``; errors as `check_api`."""
        _check(header, self.budget_token)

    def check_api(self, header: str) -> None:
        """Check the ``Authorization`` header of ``/v1``.

        Raises:
            ApiError: It does not hold the key.
        """
        if self.api_key is not None:
            _check(header, self.api_key)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_in(host_header: str) -> str | None:
    with contextlib.suppress(ValueError):  # it is nothing that could be in a URL
        return urllib.parse.urlsplit(f"//{host_header}").hostname
    return None


def _check(header: str, secret: str) -> None:
    kind, _, shown = header.partition(" ")
    digests = [hashlib.sha256(text.encode()).digest() for text in (shown.strip(), secret)]
    is_same = hmac.compare_digest(*digests)
    if kind.lower() != "bearer" or not is_same:
        raise ApiError(401, "the bearer token is missing or wrong", code="invalid_api_key")


def read_secret(path: Path | None, variable: str) -> str | None:
    """The secret in the file, or in the environment variable; ``None`` where neither is given.

    Raises:
        UsageError: It is too short or too long to be one.
    """
    if path is not None:
        found = path.read_text(encoding="utf-8", errors="replace")[: MAX_SECRET + 1]
    else:
        found = os.environ.get(variable, "")
    secret, place = found.strip(), str(path) if path is not None else f"${variable}"
    if not secret and path is None:
        return None
    if not LEAST_SECRET <= len(secret) <= MAX_SECRET or not secret.isprintable():
        raise UsageError(
            f"{place} has {len(secret)} characters; a token needs {LEAST_SECRET} to {MAX_SECRET} "
            "printable ones on one line"
        )
    return secret


def new_secret() -> str:
    """A token nobody guesses."""
    return secrets.token_urlsafe(24)
