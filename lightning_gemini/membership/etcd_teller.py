"""What the agent hears of what is in etcd. Each thing once, in order, and nothing after the end.

Seam: `look` compares a view with what was told before; `expel` may come from any thread. The clock for what takes time is here too: it
starts when this agent sees something, so that nobody's clock is compared with another's, and a new leader has waited as long as it was
there.

States: looking -> over: the job has ended, or this node is no part of it any more.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_gemini.membership.base import Observer
from lightning_gemini.membership.etcd_duties import Terms, lacking
from lightning_gemini.membership.etcd_keys import Formed, node_key
from lightning_gemini.membership.etcd_view import View
from lightning_gemini.membership.outbox import Outbox
from lightning_gemini.membership.records import Generation


class Teller:
    """See the module's docstring."""

    def __init__(self, node: str, terms: Terms, observer: Observer, outbox: Outbox, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.over = self.expelled = False
        self._node, self._terms, self._observer, self._outbox = node, terms, observer, outbox
        self._told = Generation(number=-1, roster=[])
        self._seen = 0.0
        """When the newest generation was."""
        self._planned = self._recovered = -1
        self._news = ""
        self._lacking_since: float | None = None

    def look(self, view: View) -> None:
        """Tell what is new."""
        if self.over:
            return
        if view.ending is None and (why := self._why_expelled(view)):
            return self.expel(why)
        if view.formed is not None:
            if self._told.number < 0:  # what was over before we came is not for us
                self._recovered = max((outcome.number for outcome in view.outcomes()), default=-1)
            self._tell_generation(view.formed)
            self._tell_recovery(view, view.formed.generation.number)
        self._tell_lack(view)
        if (ending := view.ending) is not None:
            self.over = True
            self._outbox.post(lambda: self._observer.on_ending(ending), last=True)

    def expel(self, why: str) -> None:
        """The first reason counts."""
        self.over, self.expelled = True, self.expelled or not self.over
        self._outbox.post_instead(lambda: self._observer.on_expelled(f"node {self._node} is expelled: {why}"))

    def news(self, text: str) -> None:
        """Once."""
        if text != self._news:
            self._news = text
            self._outbox.post(lambda: self._observer.on_news(text))

    def _why_expelled(self, view: View) -> str:
        if view.lost or (self._told.roster and view.formed is None):
            return "etcd has lost the keys of this job: it was wiped or restored, or they were deleted"
        if view.held(node_key(self._node)) is None:
            return "its registration in etcd is gone: it was silent for too long, or another node found nobody at its address"
        if view.formed is not None and self._node in self._told.roster and self._node not in view.formed.generation.roster:
            return f"another node has its place in generation {view.formed.generation.number}"
        return ""

    def _tell_generation(self, formed: Formed) -> None:
        now = formed.generation
        if now == self._told:
            return
        if now.number != self._told.number:
            self._seen = self.clock()
        self._told = now
        self._outbox.begin(now.number)
        self._outbox.post(lambda: self._observer.on_generation(now, formed.nodes), now.number)

    def _tell_recovery(self, view: View, number: int) -> None:
        plan = view.plan(number)
        if plan is not None and number > max(self._planned, self._recovered):
            self._planned = number
            self._outbox.post(lambda: self._observer.on_plan(number, plan), number)
        for outcome in view.outcomes():
            if outcome.number > self._recovered:
                self._recovered = outcome.number
                self._outbox.post(lambda outcome=outcome: self._observer.on_recovered(outcome))  # type: ignore[misc]

    def _tell_lack(self, view: View) -> None:
        text = lacking(view, self._terms)
        if not text:
            self._lacking_since = None
        else:
            self._lacking_since = self._lacking_since or self.clock()
            self.news(text)

    def waited_s(self) -> float:
        """For how long the job has waited for nodes."""
        return 0.0 if self._lacking_since is None else self.clock() - self._lacking_since

    def spent_s(self, view: View) -> float:
        """What the newest generation has cost so far; 0 when its recovery is complete."""
        number = self._told.number
        if number <= 0 or any(outcome.number == number for outcome in view.outcomes()):
            return 0.0
        return self._told.detect_s + self.clock() - self._seen
