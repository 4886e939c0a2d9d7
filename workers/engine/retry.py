"""Runs decode steps so that one sequence's fault stays its own (design §2.8).

A step that fails is dropped and run again: without the sequences that read from a shard which is late or
lost; after any other error one sequence at a time. Called by ``engine``, which says what becomes of a
sequence that failed; it must not know requests or memory.
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from farshore.attention_offload.base import AttentionModel
from farshore.errors import Internal, Late, Lost, TransportError
from farshore.ids import WorkerId
from farshore.workers.engine.decode import step_entry as decode
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.decode.planner import Planner
from farshore.workers.engine.decode.step import Steps
from farshore.workers.engine.decode.step_entry import StepEntry

_log = logging.getLogger(__name__)


class Decoder:
    """``suspect`` is told of shards whose frames failed."""

    def __init__(
        self,
        steps: Steps,
        attention: AttentionModel,
        tuner: MicroBatchTuner,
        *,
        suspect: Callable[[Iterable[WorkerId], TransportError], None],
    ) -> None:
        self._steps = steps
        self._attention = attention
        self._tuner = tuner
        self._suspect = suspect
        self._planner = Planner(attention)
        self._step = 0

    def run(self, entries: Seq[StepEntry]) -> None:
        """A step of the turns, whose tails have room. Then each has drawn tokens, which are committed; or an
        error of its own; or neither, since a shard that it reads from is late or lost."""
        together = [entry for entry in entries if not entry.sequence.runs_alone]
        while together:
            try:
                self._run(together)
                break
            except (Late, Lost) as error:
                self._suspect([WorkerId(shard) for shard in error.shards], error)
                others = [entry for entry in together if not entry.sequence.workers & error.shards]
                if len(others) == len(together):
                    raise Internal(f"no sequence reads from the shards of: {error}") from error
                together = others
            except Exception as error:
                if len(together) > 1:
                    _log.warning("a step of %d sequences failed", len(together), exc_info=error)
                for entry in together:
                    entry.sequence.runs_alone = True
                break
        for entry in entries:
            if entry.sequence.runs_alone:
                self._run_alone(entry)

    def _run_alone(self, entry: StepEntry) -> None:
        """A sequence of a step that failed. It runs alone until that succeeded or raised, which may take
        several rounds: a refusal ends the shard's connection."""
        try:
            self._run([entry])
        except (Late, Lost) as error:
            self._suspect([WorkerId(shard) for shard in error.shards], error)
        except Exception as error:
            entry.error = error
            entry.sequence.runs_alone = False
        else:
            entry.sequence.runs_alone = False

    def _run(self, entries: Seq[StepEntry]) -> None:
        """A step, committed, its tokens drawn; one that raises leaves no trace."""
        self._step += 1
        try:
            plan = self._planner.plan(self._step, entries)
            with self._tuner.step(len(plan.sequences)) as micro_batches:
                logits = self._steps.run(
                    plan,
                    [token for entry in entries for token in (entry.sequence.tokens[-1], *entry.guesses)],
                    [entry.sequence.placed_tail for entry in entries for _ in range(entry.rows)],
                    micro_batches=micro_batches,
                )
        except Exception:
            decode.drop_scratch(entries)
            raise
        decode.draw(entries, logits)
        decode.commit(plan, entries, self._attention)
