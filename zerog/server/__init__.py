"""The HTTP server.  Only here is an event loop; everything below is plain synchronous code, called in threads."""

from zerog.clock import to_iso as iso
from zerog.exceptions import Problem
from zerog.server.endpoint import Answer, Endpoint, Parameter, RunParameter, header, invalid

__all__ = ["Answer", "Endpoint", "Parameter", "Problem", "RunParameter", "header", "invalid", "iso"]
