"""Keeps authenticated callers apart: their request ids and what they can learn from the cache."""

import hmac
import secrets

from scheduler_service.access.caller import Caller


class Tenancy:
    """What of a request depends on who sent it.

    Without authentication everybody is one tenant, since an address proves nothing.
    """

    def __init__(self, *, shared_prefix_cache: bool = False) -> None:
        """`shared_prefix_cache` lets tenants hit each other's cached prefixes."""
        self._shared_prefix_cache = shared_prefix_cache
        # Nobody can compute another tenant's salt; the cache does not outlive the process either.
        self._key = secrets.token_bytes(32)

    def owner_of(self, caller: Caller) -> str:
        """Returns whose request ids the caller's are."""
        return caller.name if caller.is_authenticated else ""

    def cache_salt(self, caller: Caller, salt: str) -> str:
        """Returns the salt to use for a request of `caller` that asks for `salt`.

        A hit in the prefix cache shows in the time to the first token and in the usage, so a tenant
        who shares a cache can find out what others have sent.
        """
        if self._shared_prefix_cache or not caller.is_authenticated:
            return salt
        # The length keeps the two parts apart.
        name = caller.name.encode()
        message = len(name).to_bytes(4, "big") + name + salt.encode()
        return hmac.digest(self._key, message, "sha256").hex()
