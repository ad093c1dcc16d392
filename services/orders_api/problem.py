"""Refusals as problem details (RFC 9457): every one says what is wrong, and where."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

PROBLEM_JSON = "application/problem+json"

TITLES = {
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
"""The words of RFC 9110, for a problem of the type about:blank means no more than its status; `detail` says the rest."""


class Mistake(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is wrong, and where: a JSON pointer into the body (RFC 6901, as a URI fragment), or the name of a parameter."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None


class ProblemDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a refusal."""

    type: str
    title: str
    status: int
    detail: str
    errors: tuple[Mistake, ...] = ()


class Problem(Exception):
    """Raised anywhere below the router; it becomes the response."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[Mistake] = (),
        headers: Sequence[tuple[str, str]] = (),
        kind: str = "about:blank",
    ) -> None:
        self.status = status
        self.headers = list(headers)
        self.details = ProblemDetails(kind, TITLES[status], status, detail, tuple(errors))
        super().__init__(detail)
