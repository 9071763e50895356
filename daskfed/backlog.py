"""Work that a site was given and has not finished, by priority. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Work:
    """A number of blocks with their tasks and the seconds of one thread that these are expected to take."""

    blocks: int = 0
    ntasks: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Backlog:
    """The sums of unfinished work. Work of a lower priority does not stand in the way of what has a higher one."""

    total: Work = field(default_factory=Work)
    levels: dict[int, Work] = field(default_factory=dict)  # priority -> work of just that priority

    def add(self, priority: int, ntasks: int, seconds: float) -> None:
        """Count a block."""
        for work in (self.total, self.levels.setdefault(priority, Work())):
            work.blocks += 1
            work.ntasks += ntasks
            work.seconds += seconds

    def remove(self, priority: int, ntasks: int, seconds: float) -> None:
        """Stop counting a block that was added with the same figures."""
        for work in (self.total, self.levels[priority]):
            work.blocks -= 1
            work.ntasks -= ntasks
            work.seconds = max(0.0, work.seconds - seconds) if work.blocks else 0.0
        if not self.levels[priority].blocks:
            del self.levels[priority]

    def ahead_of(self, priority: int) -> Work:
        """Return the work that runs before a new block of ``priority``: of this priority and higher ones."""
        if all(level >= priority for level in self.levels):
            return self.total
        ahead = [work for level, work in self.levels.items() if level >= priority]
        return Work(*(sum(getattr(work, name) for work in ahead) for name in ("blocks", "ntasks", "seconds")))
