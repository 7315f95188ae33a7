"""Scores by a server with LLaMA-Factory's JSON interface.

    POST {"model": "model", "messages": [text, ...]}  ->  {"scores": [number, ...]}

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

import torch
from torch import Tensor

from fastppo.config.rewards import without_query
from fastppo.errors import UserError
from fastppo.types import Rollout

TOKEN = "FASTPPO_REWARD_TOKEN"
MAX_ANSWER = 1 << 20  # bytes; a score takes about 20
LARGEST = torch.finfo(torch.float32).max
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, doubled each time


class TransientError(Exception):
    """A failure that is worth another attempt: no connection, a timeout, status 429 or 5xx."""


class ApiReward:
    """Scores a rollout with a server; returns (B,) float32.

    The server gets prompt and response as one text, special tokens included.

    Args:
        url: the URL to POST to.
        tokenizer: the policy's, which decodes the texts.
        timeout: seconds in which an attempt must have the whole answer.
        retries: number of attempts after the first.
        batch_size: largest number of texts in a request.
    """

    def __init__(
        self, url: str, tokenizer: Any, *, timeout: float, retries: int, batch_size: int
    ) -> None:
        self.url, self.tokenizer = url, tokenizer
        self.timeout, self.retries, self.batch_size = timeout, retries, batch_size
        self.key = f"reward_model: {without_query(url)}"
        self.opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self.opener.add_handler(handler)

    def __call__(self, rollout: Rollout) -> Tensor:
        rows = rollout.input_ids_BT.tolist()
        ids = [row[:length] for row, length in zip(rows, rollout.lengths, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            scores += self.scores(texts[start : start + self.batch_size])
        return torch.tensor(scores, device=rollout.input_ids_BT.device)

    def scores(self, messages: list[str]) -> list[float]:
        """A finite number for each message; a TransientError is retried, then a UserError."""
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return self.parse_scores(self.post(messages), len(messages))
            except TransientError as error:
                if attempt == self.retries:
                    raise UserError(
                        f"{self.key}: {error}, attempt {attempt + 1} of {attempt + 1}; check the "
                        "server, or raise reward_api_timeout or reward_api_retries"
                    ) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def post(self, messages: list[str]) -> bytes:
        """Send one request; returns the body of the answer."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        body = json.dumps({"model": "model", "messages": messages}).encode()
        deadline = time.monotonic() + self.timeout
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return self.read(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            raise self.status_error(error.code) from None
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
            raise UserError(f"{self.key}: {TOKEN} has a character no header can have") from None

    def read(self, response: Any, deadline: float) -> bytes:
        """The whole body; an error if it exceeds MAX_ANSWER bytes or is late.

        The deadline is for all reads together, so that a server that sends a byte now and then also
        misses it.
        """
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                raise UserError(
                    f"{self.key}: its answer is over {MAX_ANSWER} bytes; it should be "
                    '{"scores": [...]} and little else'
                )
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # bytes of Content-Length that did not arrive
            raise TransientError("the connection broke within an answer")
        return b"".join(parts)

    def status_error(self, status: int) -> Exception:
        """The exception for an HTTP status other than 2xx: TransientError or UserError."""
        if status == 429 or status >= 500:
            return TransientError(f"answers HTTP {status}")
        if 300 <= status < 400:
            return UserError(
                f"{self.key}: redirects elsewhere (HTTP {status}), which is not followed; name the "
                "final URL"
            )
        if status in (401, 403):
            return UserError(
                f"{self.key}: HTTP {status}; set the environment variable {TOKEN} to its token"
            )
        return UserError(f"{self.key}: HTTP {status}; check the URL")

    def quote(self, answer: bytes | str) -> str:
        """The beginning of an answer, for an error line; tokens and queries in it are removed."""
        for secret in (os.environ.get(TOKEN), urlsplit(self.url).query):
            if secret and isinstance(answer, bytes):
                answer = answer.replace(secret.encode(), b"***")
            elif secret and isinstance(answer, str):
                answer = answer.replace(secret, "***")
        return repr(answer[:60])

    def parse_scores(self, body: bytes, count: int) -> list[float]:
        """The scores in the body of an answer, which must be `count` finite numbers."""
        wanted = f'it should be {{"scores": [...]}} with {count} finite numbers'
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise UserError(f"{self.key}: answers {self.quote(body)}, not JSON; {wanted}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise UserError(f"{self.key}: answers {self.quote(body)} without scores; {wanted}")
        if len(scores) != count:
            raise UserError(f"{self.key}: answers {len(scores)} scores for {count}; {wanted}")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(
                    f"{self.key}: answers {self.quote(str(score))} as a score; {wanted}"
                )
            if not abs(score) <= LARGEST:  # also refuses NaN; integers of any size compare
                raise UserError(f"{self.key}: answers {str(score)[:60]} as a score; {wanted}")
        return [float(score) for score in scores]
