"""The queue contract (``base``) and its adapters, which only bootstrap imports."""

from zerog.queue.base import PENDING, Pending, Put, Queue, Reservation, TubeStats

__all__ = ["PENDING", "Pending", "Put", "Queue", "Reservation", "TubeStats"]
