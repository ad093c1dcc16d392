"""Signatures of messages: so that a queue to which others can write takes only what holders of a key have sent.

HMAC-SHA256 (RFC 2104, FIPS 198-1) over what a consumer acts on: topic, event id, key, content type, body. Not over headers that
change on the way (attempts, times, why it was parked), so retries and replays keep it valid.
"""

from __future__ import annotations

import hmac
import re
from binascii import Error as NoBase64, a2b_base64, b2a_base64
from struct import Struct

from orderbus._core.message import JSON, KEY, Properties
from orderbus.errors import MessageError

SIGNATURE = "ob-signature"
"""`<key id>:<base64 of the HMAC>`."""
UNSIGNED = "unsigned"
LEAST_KEY_BYTES = 32
"""As many as the hash has: RFC 2104 strongly discourages fewer."""
MOST_KEYS = 16
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,32}")
_LENGTHS = Struct(">5I")
_NO_KEY = 0xFFFFFFFF


class SigningKeys:
    """Keys by their ids: the first signs, all verify. Made by `signing_keys` from what the settings say."""

    __slots__ = ("_first", "_macs", "takes_unsigned")

    def __init__(self, keys: dict[str, bytes], *, takes_unsigned: bool = False) -> None:
        self._first = next(iter(keys))
        self._macs = {key_id: hmac.new(key, digestmod="sha256") for key_id, key in keys.items()}
        self.takes_unsigned = takes_unsigned
        """While signing is being introduced: what bears no signature is taken as before. A wrong one never is."""

    def sign(self, topic: str, event_id: str, key: str | None, content_type: str, body: bytes) -> str:
        """What goes into the header."""
        return f"{self._first}:{self._mac(self._first, topic, event_id, key, content_type, body)}"

    def check(self, topic: str, properties: Properties, body: bytes) -> None:
        """Raises MessageError, `unsigned` or `bad-signature`, for a message that no holder of a key has sent for this topic."""
        signature = properties.headers.get(SIGNATURE)
        if signature is None:
            if self.takes_unsigned:
                return
            raise MessageError("unsigned", f"the message has no header {SIGNATURE}, and ORDERBUS_SIGNING_KEYS asks for one")
        if not isinstance(signature, str):
            raise MessageError("bad-signature", f"the header {SIGNATURE} is no text")
        key_id, _, given = signature.partition(":")
        if key_id not in self._macs:
            raise MessageError(
                "bad-signature", f"it is signed with the key {key_id[:32]!r}; ORDERBUS_SIGNING_KEYS has {', '.join(self._macs)}"
            )
        key = properties.headers.get(KEY)
        mac = self._mac(
            key_id,
            topic,
            properties.message_id or "",
            key if isinstance(key, str) else None,
            properties.content_type or JSON,
            body,
        )
        if not hmac.compare_digest(mac.encode(), given.encode("utf-8", "surrogatepass")):
            raise MessageError(
                "bad-signature",
                f"it was not signed as it is with the key {key_id!r}: topic, id, key, content type or body differ",
            )

    def _mac(self, key_id: str, topic: str, event_id: str, key: str | None, content_type: str, body: bytes) -> str:
        """Each part goes in behind all lengths, so that no two messages have the same bytes; no key differs from an empty one."""
        parts = [part.encode("utf-8", "surrogatepass") for part in (topic, event_id, key or "", content_type)]
        lengths = [len(part) for part in parts]
        if key is None:
            lengths[2] = _NO_KEY
        mac = self._macs[key_id].copy()
        mac.update(b"".join((_LENGTHS.pack(*lengths, len(body)), *parts)))
        mac.update(body)
        return b2a_base64(mac.digest(), newline=False).decode()


def signing_keys(text: str | None) -> SigningKeys | None:
    """The keys in `2026b:<base64>,2026a:<base64>`, or None where nothing is set. Raises ValueError, whose text shows no secret."""
    if text is None:
        return None
    keys: dict[str, bytes] = {}
    entries = [entry.strip() for entry in text.split(",")]
    takes_unsigned = entries[-1] == UNSIGNED
    for n, entry in enumerate(entries[:-1] if takes_unsigned else entries, 1):
        key_id, colon, secret = entry.partition(":")
        if not colon or not _KEY_ID.fullmatch(key_id):
            raise ValueError(f"entry {n} is not `id:base64`, where an id is 1 to 32 letters, digits, dots, dashes")
        if key_id in keys:
            raise ValueError(f"the key id {key_id!r} is there twice")
        keys[key_id] = _secret(key_id, secret)
    if not 1 <= len(keys) <= MOST_KEYS:
        raise ValueError(f"there are {len(keys)} keys; it takes 1 to {MOST_KEYS}")
    return SigningKeys(keys, takes_unsigned=takes_unsigned)


def masked_keys(text: str) -> str:
    """The ids alone, to print."""
    return ",".join(_masked(entry.strip()) for entry in text.split(","))


def _masked(entry: str) -> str:
    key_id, colon, _ = entry.partition(":")
    if entry == UNSIGNED:
        return entry
    return f"{key_id}:***" if colon and _KEY_ID.fullmatch(key_id) else "***"


def _secret(key_id: str, text: str) -> bytes:
    try:
        secret = a2b_base64(text.encode("ascii"), strict_mode=True)
    except (NoBase64, UnicodeEncodeError):
        raise ValueError(f"the key {key_id!r} is not base64; make one with `openssl rand -base64 32`") from None
    if len(secret) < LEAST_KEY_BYTES:
        raise ValueError(
            f"the key {key_id!r} has {len(secret)} bytes; at least {LEAST_KEY_BYTES}: make one with `openssl rand -base64 32`"
        )
    return secret
