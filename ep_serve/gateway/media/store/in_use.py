"""What requests are using, and how much of it is whose."""

from __future__ import annotations

from collections import Counter


class InUse:
    """Media that have to stay: what is being received, and what running requests refer to.

    The event loop changes it. Other threads may ask whether a name is in it.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._sizes: dict[str, int] = {}
        self._users: dict[str, Counter[str]] = {}
        self._tenants: Counter[str] = Counter()

    def __contains__(self, name: object) -> bool:
        return name in self._users

    def of(self, tenant: str) -> int:
        """Bytes that a tenant uses; what several tenants use counts for each of them."""
        return self._tenants[tenant]

    def oldest(self, name: str, tenant: str) -> bool:
        """Whether the tenant uses nothing that it began to use before this."""
        return next((used for used, users in self._users.items() if tenant in users), name) == name

    def hold(self, name: str, tenant: str) -> None:
        """Let a medium stay until `release` is called as often."""
        users = self._users.setdefault(name, Counter())
        if not users[tenant]:
            self._tenants[tenant] += self._sizes.get(name, 0)
        users[tenant] += 1

    def resize(self, name: str, nbytes: int) -> None:
        """Count the bytes of a medium that is held; until then it counts for nothing."""
        change = nbytes - self._sizes.get(name, 0)
        self._sizes[name] = nbytes
        self.nbytes += change
        for tenant in self._users[name]:
            self._tenants[tenant] += change

    def release(self, name: str, tenant: str) -> None:
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
