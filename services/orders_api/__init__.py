"""The Orders API: takes orders over HTTP, and tells what became of them."""

from services.orders_api.service import bus

__all__ = ["bus"]
