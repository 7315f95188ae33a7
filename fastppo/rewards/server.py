"""Scores by a server that speaks LLaMA-Factory's JSON.

    POST {"model": "model", "messages": [text, ...]}  ->  {"scores": [number, ...]}

The standard library's client, for what it lets one leave out: this opener knows http, https and
nothing else, so it follows no redirect and opens no file. httpx has a deadline for each read and
none for the whole answer, and no cap on its size.
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
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts: doubled from one to the next


class TryAgain(Exception):
    """A failure that may pass: no connection, a timeout, 429, 5xx."""


class ApiReward:
    """Scores (B,) float32 from a server: it sees whole texts, special tokens included."""

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
        """One finite number a message; a failure that may pass is tried again, others stop."""
        wait = FIRST_WAIT
        for attempt in range(self.retries + 1):
            try:
                return self.check(self.post(messages), len(messages))
            except TryAgain as error:
                if attempt == self.retries:
                    raise UserError(
                        f"{self.key}: {error}, attempt {attempt + 1} of {attempt + 1}; check the "
                        "server, or raise reward_api_timeout or reward_api_retries"
                    ) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def post(self, messages: list[str]) -> bytes:
        """The body of the answer to one request."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        body = json.dumps({"model": "model", "messages": messages}).encode()
        ends = time.monotonic() + self.timeout
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return self.read(response, ends)
        except urllib.error.HTTPError as error:
            error.close()
            raise self.refusal(error.code) from None
        except TimeoutError:
            raise TryAgain(f"no answer in {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TryAgain(f"no answer in {self.timeout:g} s") from None
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self.key}: its certificate is not trusted ({error.reason.verify_message}); "
                    "name the host that it was made for, or set SSL_CERT_FILE to its authority"
                ) from None
            raise TryAgain(f"no connection ({error.reason})") from None
        except (http.client.HTTPException, OSError) as error:
            raise TryAgain(f"the connection broke ({type(error).__name__})") from None
        except ValueError:  # http.client on a header it cannot send; the value is not repeated
            raise UserError(f"{self.key}: {TOKEN} has a character no header can have") from None

    def read(self, response: Any, ends: float) -> bytes:
        """At most MAX_ANSWER bytes, and in time: a trickle is no answer either."""
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER:
                raise UserError(
                    f"{self.key}: its answer is over {MAX_ANSWER} bytes; it should be "
                    '{"scores": [...]} and little else'
                )
            if time.monotonic() > ends:
                raise TimeoutError
        if response.length:  # of Content-Length, what never came
            raise TryAgain("the connection broke within an answer")
        return b"".join(parts)

    def refusal(self, status: int) -> Exception:
        """What an HTTP status other than 2xx comes to."""
        if status == 429 or status >= 500:
            return TryAgain(f"answers HTTP {status}")
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

    def quoted(self, answer: bytes | str) -> str:
        """The start of an answer, without the token or the query that a server may echo."""
        for secret in (os.environ.get(TOKEN), urlsplit(self.url).query):
            if secret and isinstance(answer, bytes):
                answer = answer.replace(secret.encode(), b"***")
            elif secret and isinstance(answer, str):
                answer = answer.replace(secret, "***")
        return repr(answer[:60])

    def check(self, body: bytes, count: int) -> list[float]:
        """The scores in an answer: as many as asked for, finite numbers."""
        wanted = f'it should be {{"scores": [...]}} with {count} finite numbers'
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise UserError(
                f"{self.key}: answers {self.quoted(body)}, not JSON; {wanted}"
            ) from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise UserError(f"{self.key}: answers {self.quoted(body)} without scores; {wanted}")
        if len(scores) != count:
            raise UserError(f"{self.key}: answers {len(scores)} scores for {count}; {wanted}")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(
                    f"{self.key}: answers {self.quoted(str(score))} as a score; {wanted}"
                )
            if not abs(score) <= LARGEST:  # NaN is not, and integers of any length compare
                raise UserError(f"{self.key}: answers {str(score)[:60]} as a score; {wanted}")
        return [float(score) for score in scores]
