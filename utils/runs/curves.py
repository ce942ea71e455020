"""Curves for TensorBoard, written where they are asked for: no thread that dies unseen when the disk is full."""

import os
import time
from pathlib import Path


class Curves:
    """Scalars in an event file of its own in `folder`, which is made. Every method raises OSError."""

    def __init__(self, folder: Path, purge_step: int):
        """purge_step: curves of earlier event files end before this step."""
        # Here, because they take a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("xb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        if points:
            self._add(step=step, summary=self._summary(value=points))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()
