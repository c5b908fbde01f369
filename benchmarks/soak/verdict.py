# SPDX-License-Identifier: Apache-2.0
"""What a soak found, and what of it must not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_eigen.benchmarks.lib.processes import Growth
from vllm_eigen.benchmarks.soak.load import Tally


@dataclass(frozen=True)
class Verdict:
    """The result; `violations` is empty if all is well.

    Attributes:
        sent, failed: requests by kind.
        failures: the first of them in words.
        probes: greedy prompts; `probes_checked` answers, of which `probes_different` changed.
        blocks_at_rest: KV blocks in use when no request was left.
        memory: of every process of the server, after the warm-up.
    """

    sent: dict[str, int]
    failed: dict[str, int]
    failures: list[str]
    probes: int
    probes_checked: int
    probes_different: int
    preemptions: int
    blocks_at_rest: int
    memory: list[Growth]
    seconds: float
    violations: list[str]

    def lines(self) -> list[str]:
        """For the screen, violations and failures left out."""
        found = [
            f"{kind:<14} {count:>6} sent {self.failed.get(kind, 0):>6} failed"
            for kind, count in self.sent.items()
        ]
        found += [
            f"{item.name:<14} {item.end / 2**20:>6.0f} MiB {item.percent:>+6.1f} %"
            for item in self.memory
        ]
        return [
            *found,
            f"{self.probes_checked} greedy answers compared, {self.probes_different} different; "
            f"{self.preemptions} preemptions, {self.blocks_at_rest} blocks in use at rest; "
            f"{self.seconds:.0f} s",
        ]


def judge(
    tally: Tally,
    *,
    probes: int,
    blocks_at_rest: int,
    preemptions: int,
    memory: Sequence[Growth],
    max_growth: float,
    seconds: float,
) -> Verdict:
    """Compare what was seen with what must hold; `max_growth` is in percent of a process."""
    wrong = []
    if failed := sum(tally.failed.values()):
        wrong.append(f"{failed} of {sum(tally.sent.values())} requests failed")
    if blocks_at_rest:
        wrong.append(f"{blocks_at_rest} blocks are in use with no request running")
    wrong += [
        f"process {item.name} ({item.pid}) grew by {item.percent:.1f} %"
        for item in memory
        if item.percent > max_growth
    ]
    if tally.probes_different:
        wrong.append(
            f"{tally.probes_different} of {tally.probes_checked} greedy answers changed under load"
        )
    if not tally.probes_checked:
        wrong.append("no greedy answer was compared")
    return Verdict(
        sent=dict(tally.sent),
        failed=dict(tally.failed),
        failures=tally.examples,
        probes=probes,
        probes_checked=tally.probes_checked,
        probes_different=tally.probes_different,
        preemptions=preemptions,
        blocks_at_rest=blocks_at_rest,
        memory=list(memory),
        seconds=round(seconds, 1),
        violations=wrong,
    )
