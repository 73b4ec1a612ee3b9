"""Training speed: tokens per second, model FLOPs utilisation (MFU), and the share of time spent waiting for input."""

from collections.abc import Mapping

from lm.evaluation import flops
from lm.tracking.tracker import Tracker


class Throughput:
    """Tokens (positions of the rows) per second of training; compilation, evaluation and checkpoints do not count."""

    def __init__(
        self,
        tracker: Tracker,
        start_step: int,
        *,
        tokens_per_step: int,
        flops_per_token: Mapping[str, float | None],
        device_kind: str,
        num_devices: int,
    ):
        """
        Args:
          tracker: counts the time of training steps and of waiting for input.
          start_step: steps done before this process began.
          tokens_per_step: positions of a global batch, padding included.
          flops_per_token: 'mfu' (attention in full) and 'mfu_causal' (its causal half) -> model FLOPs of training on a
            token; empty where they are not known.
          device_kind: of `jax.Device`.
          num_devices: over all hosts.
        """
        self.input_bound = 0.0
        self._tracker, self._tokens_per_step, self._flops_per_token = tracker, tokens_per_step, flops_per_token
        self._device_kind, self._num_devices = device_kind, num_devices
        self._began = self._last = (start_step, *self._seconds())

    def _seconds(self) -> tuple[float, float]:
        """Seconds of training, and how many of them were spent waiting for input."""
        seconds = self._tracker.goodput()
        return seconds["step"] + seconds["input"], seconds["input"]

    def _since(self, mark: tuple[int, float, float], step: int) -> tuple[float, float]:
        """Tokens per second since a mark, and the share of that time spent waiting for input."""
        training, waiting = self._seconds()
        seconds = max(training - mark[1], 1e-9)
        return (step - mark[0]) * self._tokens_per_step / seconds, (waiting - mark[2]) / seconds

    def update(self, step: int) -> float:
        """Tokens per second over the last steps, about 5 seconds of them; sets `input_bound` for the same steps."""
        value, self.input_bound = self._since(self._last, step)
        if self._seconds()[0] - self._last[1] > 5:
            self._last = (step, *self._seconds())
        return value

    def overall(self, step: int) -> float:
        """Tokens per second since this process began training; 0 if it has done no step."""
        return self._since(self._began, step)[0] if step > self._began[0] else 0.0

    def overall_input_bound(self) -> float:
        """Share of the time spent waiting for input since this process began training, in [0, 1]."""
        return self._since(self._began, 0)[1]

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """'mfu', 'mfu_causal' and 'tokens_per_second_a_device'; empty where the device's peak is not known."""
        mfu = {
            name: flops.mfu(tokens_per_second, per_token, self._device_kind, self._num_devices)
            for name, per_token in self._flops_per_token.items()
        }
        known = {name: value for name, value in mfu.items() if value is not None}
        return known | ({"tokens_per_second_a_device": tokens_per_second / self._num_devices} if known else {})
