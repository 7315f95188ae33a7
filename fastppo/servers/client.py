"""JSON over HTTP: bounded in time and size, retried, without redirects.

It uses the standard library's client with only the http and https handlers, so it follows no
redirect and opens no file. httpx would have a time limit for each read, but none for the whole
answer, and no limit on its size.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from fastppo.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time


class TransientError(Exception):
    """A failure that is worth another attempt: no connection, a timeout, status 429 or 5xx."""


class Unreachable(UserError):
    """No attempt had an answer: the server is not there, is too slow, or has failed."""


class Client:
    """Sends requests to one server; every failure is one line that begins with `key`.

    Args:
        key: what the user has set, to begin each message.
        url: the beginning of every URL; its query is never shown.
        timeout: seconds in which an attempt must have the whole answer.
        retries: number of attempts after the first.
        token: the environment variable with the server's token, which is in no message.
        cure: the end of the message after the last attempt.
        largest: bytes of an answer; a longer one is refused.
        wanted: what an answer should be, for the message.
    """

    def __init__(
        self,
        key: str,
        url: str,
        *,
        timeout: float,
        retries: int,
        token: str,
        cure: str,
        largest: int,
        wanted: str,
    ) -> None:
        self.key, self.url, self.token = key, url, token
        self.timeout, self.retries = timeout, retries
        self.cure, self.largest, self.wanted = cure, largest, wanted
        self.opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self.opener.add_handler(handler)

    def ask(self, body: Any = None, path: str = "") -> bytes:
        """POST `body` as JSON (without one: GET) to the URL and `path`; returns the answer.

        Raises:
            Unreachable: the last attempt failed as well.
            UserError: an answer that another attempt would not change.
        """
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return self.attempt(body, path)
            except TransientError as error:
                if attempt == self.retries:
                    raise Unreachable(
                        f"{self.key}: {error}, attempt {attempt + 1} of {attempt + 1}; {self.cure}"
                    ) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def attempt(self, body: Any, path: str) -> bytes:
        """Send one request; returns the body of the answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(self.token):
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + self.timeout
        method = "GET" if data is None else "POST"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return self.read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self.status_error(error.code, error) from None
        except TimeoutError:
            raise TransientError(f"no answer in {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TransientError(f"no answer in {self.timeout:g} s") from None
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self.key}: its certificate is not trusted ({error.reason.verify_message}); "
                    "name the host that it was made for, or set SSL_CERT_FILE to its authority"
                ) from None
            raise TransientError(f"no connection ({error.reason})") from None
        except (http.client.HTTPException, OSError) as error:
            raise TransientError(f"the connection broke ({type(error).__name__})") from None
        except ValueError:  # http.client cannot send a header; its value may be secret
            raise UserError(
                f"{self.key}: {self.token} has a character no header can have"
            ) from None

    def read(self, response: Any, deadline: float) -> bytes:
        """The whole body; an error if it exceeds `largest` bytes or is late.

        The deadline is for all reads together, so that a server that sends a byte now and then also
        misses it.
        """
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > self.largest:
                raise UserError(
                    f"{self.key}: its answer is over {self.largest} bytes; it should be "
                    f"{self.wanted} and little else"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # bytes of Content-Length that did not arrive
            raise TransientError("the connection broke within an answer")
        return b"".join(parts)

    def status_error(self, status: int, answer: Any) -> Exception:
        """The exception for an HTTP status other than 2xx: TransientError or UserError.

        `answer` is the response, still open, for those who read what the server says.
        """
        del answer
        if status == 429 or status >= 500:
            return TransientError(f"answers HTTP {status}")
        if 300 <= status < 400:
            return UserError(
                f"{self.key}: redirects elsewhere (HTTP {status}), which is not followed; name the "
                "final URL"
            )
        if status in (401, 403):
            return UserError(
                f"{self.key}: HTTP {status}; set the environment variable {self.token} to its token"
            )
        return UserError(f"{self.key}: HTTP {status}; check the URL")

    def quote(self, answer: bytes | str, most: int = 60) -> str:
        """The beginning of an answer, for an error line; tokens and queries in it are removed."""
        for secret in (os.environ.get(self.token), urlsplit(self.url).query):
            if secret and isinstance(answer, bytes):
                answer = answer.replace(secret.encode(), b"***")
            elif secret and isinstance(answer, str):
                answer = answer.replace(secret, "***")
        return repr(answer[:most])
