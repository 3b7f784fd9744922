"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is refused or failed: an HTTP status and OpenAI's error object.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        What came and what is accepted.
    param : str, optional
        The field at fault.
    code : str, optional
        For programs: ``"context_length_exceeded"``, ``"model_not_found"``, …
    kind : str, optional
        OpenAI's ``type``; by default it follows from the status.
    headers : dict, optional
        HTTP headers of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that is answered."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data: what crosses a process border."""
        return {
            "status": self.status,
            "message": self.message,
            "param": self.param,
            "code": self.code,
            "kind": self.kind,
            "headers": self.headers,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ApiError:
        """The error of `as_dict`."""
        return cls(data.pop("status"), data.pop("message"), **data)


_KINDS = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout"}
