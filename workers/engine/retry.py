"""Runs decode steps, and retries after an error so that only the sequence that caused it fails.

A failed step is dropped and retried: without the sequences that read from a late or lost shard, or, after any
other error, one sequence at a time (invariant 8, docs/architecture.md). Called by ``scheduler``, which
decides what happens to a failed sequence. It must not know requests or memory.
"""

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.errors import Internal, Late, Lost, TransportError
from farshore.ids import WorkerId
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.workers.engine.decode import step_entry
from farshore.workers.engine.decode.device.loop import DeviceLayerLoop
from farshore.workers.engine.decode.micro_batch_tuner import MicroBatchTuner
from farshore.workers.engine.decode.planner import Planner
from farshore.workers.engine.decode.step import LayerLoop
from farshore.workers.engine.decode.step_entry import StepEntry
from farshore.workers.engine.sequence import Sequence

_log = logging.getLogger(__name__)


class StepRunner:
    """Runs the decode steps of one engine. Not thread-safe: only the engine's thread calls it.

    ``runtime``: of the layer loop's device. ``suspect`` is called with the workers of shards whose frames
    failed.
    """

    def __init__(
        self,
        layer_loop: LayerLoop | DeviceLayerLoop,
        attention: AttentionModel,
        tuner: MicroBatchTuner,
        *,
        runtime: DeviceRuntime,
        suspect: Callable[[Iterable[WorkerId], TransportError], None],
    ) -> None:
        self._layer_loop = layer_loop
        self._attention = attention
        self._tuner = tuner
        self._runtime = runtime
        self._suspect = suspect
        self._planner = Planner(attention)
        self._step = 0

    def run(self, entries: Seq[StepEntry]) -> None:
        """Runs one step of ``entries``, whose tails must have room for their rows.

        Afterwards each entry has drawn tokens, which are committed, or an error of its own, or neither if a
        shard that it reads from is late or lost.
        """
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

    def draw_first_tokens(self, sequences: Seq[Sequence], logits: Tensor) -> list[StepEntry]:
        """Draws the first token of each completion of one prompt. Raises the first error of a sequence.

        ``logits``: f32[vocab], of the prompt's last token."""
        entries = [StepEntry(sequence, [], []) for sequence in sequences]
        step_entry.draw_tokens(entries, logits.expand(len(entries), -1), self._runtime)
        for entry in entries:
            if entry.error is not None:
                raise entry.error
        return entries

    def _run_alone(self, entry: StepEntry) -> None:
        """Runs one sequence of a failed step alone, and clears ``runs_alone`` once it succeeds or raises.

        If its shard is late or lost, the flag stays set for a later round: a refused step closes the shard's
        connection, so a retry may find it closed.
        """
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
        """Runs one step, draws its tokens and commits them. A step that raises leaves no trace."""
        self._step += 1
        try:
            plan = self._planner.plan(self._step, entries)
            with self._tuner.step(len(plan.sequences)) as micro_batches:
                logits = self._layer_loop.run(
                    plan,
                    [token for entry in entries for token in (entry.sequence.tokens[-1], *entry.guesses)],
                    [entry.sequence.placed_tail for entry in entries for _ in range(entry.rows)],
                    micro_batches=micro_batches,
                )
        except Exception:
            step_entry.truncate_tails(entries)
            raise
        step_entry.draw_tokens(entries, logits, self._runtime)
        step_entry.commit(plan, entries, self._attention)
