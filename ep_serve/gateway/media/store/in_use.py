"""Reference counts of media in use, with their bytes per tenant."""

from __future__ import annotations

from collections import Counter


class PinnedMedia:
    """Media that must not be evicted: incoming ones and those of running requests.

    Only the event loop modifies it. Other threads may test membership.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._sizes: dict[str, int] = {}
        self._users: dict[str, Counter[str]] = {}
        self._tenants: Counter[str] = Counter()

    def __contains__(self, name: object) -> bool:
        return name in self._users

    def tenant_bytes(self, tenant: str) -> int:
        """Return the bytes that a tenant pins; shared media count for each tenant."""
        return self._tenants[tenant]

    def is_oldest(self, name: str, tenant: str) -> bool:
        """Return whether a medium is the oldest one that the tenant pins."""
        return next((used for used, users in self._users.items() if tenant in users), name) == name

    def pin(self, name: str, tenant: str) -> None:
        """Pin a medium until `unpin` is called as often."""
        users = self._users.setdefault(name, Counter())
        if not users[tenant]:
            self._tenants[tenant] += self._sizes.get(name, 0)
        users[tenant] += 1

    def resize(self, name: str, nbytes: int) -> None:
        """Set the bytes of a pinned medium, initially 0."""
        change = nbytes - self._sizes.get(name, 0)
        self._sizes[name] = nbytes
        self.nbytes += change
        for tenant in self._users[name]:
            self._tenants[tenant] += change

    def unpin(self, name: str, tenant: str) -> None:
        users = self._users[name]
        users[tenant] -= 1
        if users[tenant]:
            return
        del users[tenant]
        self._tenants[tenant] -= self._sizes.get(name, 0)
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if not users:
            del self._users[name]
            self.nbytes -= self._sizes.pop(name, 0)
