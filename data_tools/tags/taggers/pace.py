"""How fast one endpoint is asked: requests at a time that follow its answers, and pauses that it asks for."""

import asyncio
import time
from email.utils import parsedate_to_datetime

# An endpoint that asks for a longer pause is asked again after this, seconds.
LONGEST_PAUSE = 600.0


def pause_seconds(retry_after: str | None, date: str | None = None) -> float:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3): a number of seconds or an HTTP date; 0 for anything else.

    Args:
        retry_after: the header.
        date: the reply's `Date` header, from which an HTTP date counts; this machine's clock where it is missing.
    """
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        until = _timestamp(retry_after)
        if until is None:
            return 0.0
        now = _timestamp(date)
        seconds = until - (time.time() if now is None else now)
    # A NaN fails the comparison.
    return min(seconds, LONGEST_PAUSE) if seconds > 0 else 0.0


def _timestamp(date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


class Pace:
    """Requests at a time to one endpoint: one more after as many answers as there are requests at a time, half as many
    after an overload (additive increase, multiplicative decrease), and none during a pause that the endpoint asked for.

    Args:
        most: requests at a time, never exceeded; also what it starts with.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.lowest = most, float(most), most
        self.running = 0
        self._not_before = 0.0
        self._halved_at = -1.0
        self._changed = asyncio.Condition()

    def pause(self, seconds: float) -> None:
        """No request starts for so long."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def paused(self) -> float:
        """Seconds until a request may start."""
        return max(0.0, self._not_before - time.monotonic())

    def room(self) -> float:
        """Share of the requests at a time that are free; negative during a pause, the more the longer it lasts."""
        paused = self.paused()
        return -paused if paused else 1 - self.running / max(1, int(self.limit))

    def succeeded(self) -> None:
        """An answer came."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def overloaded(self, started: float) -> None:
        """The endpoint could not keep up with a request; `started`: `time.monotonic()` when that request began.

        Requests that began before the last halving tell nothing about the new limit.
        """
        if started > self._halved_at:
            self.limit, self._halved_at = max(1.0, self.limit / 2), time.monotonic()
            self.lowest = min(self.lowest, int(self.limit))

    async def __aenter__(self) -> "Pace":
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self.running < int(self.limit))
                wait = self.paused()
                if not wait:
                    break
                # The pause may grow meanwhile, and others may start first.
                self._changed.release()
                try:
                    await asyncio.sleep(wait)
                finally:
                    await self._changed.acquire()
            self.running += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self.running -= 1
            self._changed.notify_all()
