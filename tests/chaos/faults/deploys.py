"""Changes of what is served, under load: deploys, scales, registrations again, and one that cannot succeed."""

from __future__ import annotations

from tests.chaos import ledger
from tests.chaos.fault import Fault
from tests.chaos.ledger import Cost

_SYNCHRONOUS = "initial_workers=1&synchronous=true"


class Deploy(Fault):
    """Version 2.0 is registered and made the default, 1.0 unregistered; then the same back. No request may notice."""

    name, weight, is_harmless = "deploy", 12, True

    def prepare(self) -> None:
        self.costs = (Cost(ledger.OTHER_VERSION, ("linear",)),)

    def inject(self) -> None:
        self._replace("linear-2.mar", "2.0", "1.0")

    def heal(self) -> None:
        self._replace("linear.mar", "1.0", "2.0")

    def _replace(self, archive: str, coming: str, going: str) -> None:
        self.site.manage("POST", f"/models?url={archive}&{_SYNCHRONOUS}")
        self.site.manage("PUT", f"/models/linear/{coming}/set-default")
        self.site.manage("DELETE", f"/models/linear/{going}")


class Scale(Fault):
    """A Python model and a native one get more workers, then fewer, then what they had. No request may notice."""

    name, weight, is_harmless = "scale", 12, True

    def inject(self) -> None:
        self._scale("echo", self.chance.choice((1, 3, 4)))
        self._scale("linear", self.chance.choice((2, 3)))

    def heal(self) -> None:
        self._scale("echo", 2)
        self._scale("linear", 1)

    def _scale(self, model: str, count: int) -> None:
        self.site.manage("PUT", f"/models/{model}?min_worker={count}&max_worker={count}&synchronous=true")


class RegisterAgain(Fault):
    """A model is unregistered, and registered again: meanwhile it is not found."""

    name, weight = "register-again", 8

    def prepare(self) -> None:
        self.costs = (Cost(ledger.REFUSED, ("streamer",), (404, 503)),)

    def inject(self) -> None:
        self.site.manage("DELETE", "/models/streamer")

    def heal(self) -> None:
        self.site.manage("POST", f"/models?url=streamer.mar&{_SYNCHRONOUS}")


class RegisterBroken(Fault):
    """An archive that is none, one that is not there, and one that is there already are registered: nothing changes."""

    name, weight, is_harmless = "register-broken", 6, True

    def inject(self) -> None:
        broken = self.site.store / "broken.mar"
        if not broken.exists():  # once: the cache notes the hash of every file that it has seen
            broken.write_bytes(bytes(2000))
        for archive in ("broken.mar", "absent.mar", "echo.mar"):
            answer = self.site.ask("POST", f"/models?url={archive}&{_SYNCHRONOUS}", port="management")
            assert 400 <= answer.status < 500, f"{archive} was answered with {answer.status} {answer.body!r}"
